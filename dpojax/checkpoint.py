"""Checkpoints by Orbax: asynchronous, sharded, whole or absent. Alone imports orbax.

A checkpoint is the state of training, a note about the run that made it and what this
had written by then in small files, sealed with the hashes of its files. After that, in
a directory it takes its name, and in a bucket, where it has its name from the start, a
marker. This file knows neither the loop nor what the state means.
"""

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from dpojax.checksums import find_damage, seal
from dpojax.object_store import Store, client_errors, in_bucket, reaching
from dpojax.progress import busy

Note = dict[str, Any]  # what JSON can hold
Place = str | Path  # a directory, or gs://bucket/path
_SMALL = 1 << 20  # bytes
_DAY = 86_400  # seconds; Orbax would give up after ten minutes
_MARKER = ocp.path.atomicity.COMMIT_SUCCESS_FILE
_FILES = "files.json"


class Newest(NamedTuple):
    """The newest checkpoint that can be used."""

    step: int | None  # None: there is none
    damaged: dict[int, str]  # what is wrong with others, by their steps


def find_newest(directory: Place) -> Newest:
    """Looks at every byte of checkpoints, from the newest back to one that is whole.

    Of those before it, which are kept for worse times, only the small files are read:
    among them what Orbax reads of each to know which is the best.

    Raises:
      ValueError: if there are checkpoints, but none is whole.
    """
    whole, damaged = None, {}
    for step in sorted(steps_in(directory), reverse=True):
        hashed_below = float("inf") if whole is None else _SMALL
        damage = find_damage(_path(directory, step), hashed_below)
        if damage is not None:
            damaged[step] = damage
        elif whole is None:
            whole = step
    if damaged and whole is None:
        raise ValueError(
            f"No checkpoint in {directory} can be used ({describe(damaged)}); put an "
            "intact copy back, or start a new run in another --output."
        )
    return Newest(whole, damaged)


def check_whole(directory: Place, step: int) -> None:
    """Looks at every byte of one checkpoint.

    Raises:
      ValueError: if it is not there, or damaged.
    """
    _check_step(step, sorted(steps_in(directory)), directory)
    damage = find_damage(_path(directory, step))
    if damage is not None:
        raise ValueError(
            f"The checkpoint of step {step} in {directory} is damaged: {damage}; "
            "take another step, or put an intact copy back."
        )


def describe(damaged: dict[int, str]) -> str:
    """What is wrong with which checkpoint."""
    return "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())


def set_aside(directory: Place, steps: Iterable[int]) -> str:
    """Moves checkpoints out of the way of new ones of their steps, and says where to.

    They are not removed: something of them may still be of use.
    """
    store, aside = Store(directory), Store(f"{directory}.damaged")
    there = aside.names()
    for step in steps:
        number = sum(name.split(".")[0] == str(step) for name in there)
        store.move(str(step), aside, f"{step}.{number}")
    return aside.place


def _path(directory: Place, step: int) -> str:
    return f"{directory}/{step}"


def _check_step(step: int, steps: list[int], directory: Place) -> None:
    if step not in steps:
        raise ValueError(
            f"{directory} has no checkpoint of step {step}; "
            f"it has {', '.join(map(str, steps)) or 'none'}."
        )


def steps_in(directory: Place) -> list[int]:
    """The steps that a directory has checkpoints of, whole or not.

    In a bucket, those that have got their marker; others were never whole.
    """
    store = Store(directory)
    names = [name for name in store.names() if name.isdecimal()]
    if store.in_bucket:
        names = [name for name in names if store.has(f"{name}/{_MARKER}")]
    return [int(name) for name in names]


def read_files(directory: Place, step: int) -> dict[str, str]:
    """The small files that were saved with a step, by their names."""
    return json.loads(Store(_path(directory, step)).read(f"files/{_FILES}"))


async def _seal(path: ocp.path.atomicity.TemporaryPathBase) -> None:
    """Seals a directory that Orbax has filled, before it counts as whole."""
    store, path._checkpoint_metadata_store = path._checkpoint_metadata_store, None
    if store is not None:  # else it is a part of a checkpoint
        # Orbax writes its own file behind our back, and without the line above once
        # more.
        await asyncio.to_thread(store.wait_until_finished)
        await asyncio.to_thread(seal, str(path.get()), path.get_final().name)


class _Renamed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Takes its name when sealed; Orbax still adds a marker, which nothing reads."""

    async def finalize(self) -> None:
        await _seal(self)
        await super().finalize()


class _Marked(ocp.path.atomicity.CommitFileTemporaryPath):
    """Gets its marker when sealed."""

    async def finalize(self) -> None:
        await _seal(self)
        await super().finalize()


class Checkpoints:
    """The checkpoints of one run: the last few, and the best by evaluation loss."""

    def __init__(
        self, directory: Place, *, keep_last: int = 2, read_only: bool = False
    ):
        """Opens the directory, which may be new unless it is only read.

        Args:
          directory: of a file system, or in a bucket.
          keep_last: checkpoints that are kept, besides the best.
          read_only: nothing is saved.

        Raises:
          OSError: if it cannot be reached.
        """
        self._directory = Store(directory).place  # Orbax's client is as ours now
        best = BestN(
            get_metric_fn=_evaluation_loss,
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = AnyPreservationPolicy([LatestN(keep_last), best])
        # Without best_fn Orbax does not write the metrics, and a resumed run could no
        # longer tell which checkpoint is the best.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else policy,
            best_fn=_evaluation_loss,
            best_mode="min",
            temporary_path_class=_Marked if in_bucket(self._directory) else _Renamed,
            async_options=ocp.AsyncOptions(timeout_secs=_DAY),
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of a run that was killed
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "note": ocp.JsonCheckpointHandler(),
            "files": ocp.JsonCheckpointHandler(_FILES),
        }
        with reaching(self._directory):
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_handlers=handlers
            )

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Any,
        note: Note,
        loss: float | None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Starts writing; training may go on at once.

        Args:
          step: number of steps taken.
          state: a pytree of arrays.
          note: what identifies the run.
          loss: the evaluation loss that decides which checkpoint is best, or None for
            a state that was not evaluated.
          files: texts of small files by their names, see `read_files`; those of
            process 0 are saved.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            note=ocp.args.JsonSave(note),
            files=ocp.args.JsonSave(dict(files or {})),
        )
        metrics = None if loss is None else {"loss": loss}
        with self._naming(), busy("Saving a checkpoint"):
            self._manager.save(step, args=items, metrics=metrics)

    def restore(self, step: int, like: Any) -> Any:
        """Reads a state, or what of it is in `like`, onto the shardings of `like`.

        Args:
          step: one of `steps`.
          like: a pytree of abstract arrays with shardings.

        Raises:
          ValueError: if there is no such step, or its arrays are not those of `like`.
        """
        _check_step(step, self.steps, self._directory)
        saved = self._manager.item_metadata(step)["state"]
        difference = _first_difference(_shapes(saved), _shapes(like))
        if difference:
            raise ValueError(
                f"The checkpoint of step {step} in {self._directory} is of another "
                f"model or optimiser: {difference}."
            )
        path = self._manager.directory / str(step) / "state"
        handler = ocp.PyTreeCheckpointHandler()
        with reaching(self._directory), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    like,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(like),
                    partial_restore=True,
                ),
            )

    def note(self, step: int) -> Note:
        """The note that was saved with a step.

        Raises:
          ValueError: if there is no such step.
        """
        _check_step(step, self.steps, self._directory)
        items = ocp.args.Composite(note=ocp.args.JsonRestore())
        with reaching(self._directory):
            return self._manager.restore(step, args=items)["note"]

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          OSError: if it could not be.
        """
        with self._naming(), busy("Saving the last checkpoint"):
            self._manager.wait_until_finished()
        self._manager.close()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """What Orbax and its storage raise, in one sentence."""
        others = client_errors(self._directory)
        try:
            yield
        except (ValueError, OSError, *others) as error:
            if isinstance(error, ValueError):  # TensorStore's, which ends with why
                reason = str(error).rsplit(": ", 1)[-1].split(" [")[0]
            else:
                reason = getattr(error, "strerror", None) or " ".join(
                    str(error).split()
                )
            raise OSError(
                f"A checkpoint could not be written to {self._directory} ({reason}); "
                "those before it are intact: mend the storage, then use --resume."
            ) from error


def _evaluation_loss(metrics: Any) -> float:
    return metrics["loss"]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {
        name(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _first_difference(
    saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> str:
    parts = {name.split("/")[0] for name in wanted}
    names = {name for name in saved if name.split("/")[0] in parts} | wanted.keys()
    for name in sorted(names):
        if saved.get(name) != wanted.get(name):
            return (
                f"{name} is {saved.get(name, 'absent')} there "
                f"and {wanted.get(name, 'absent')} here"
            )
    return ""
