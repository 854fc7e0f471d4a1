"""Checkpoints by Orbax: asynchronous, sharded, whole or absent. Alone imports orbax.

A checkpoint is the state of training and a note about the run that made it, sealed with
the hashes of its files before it takes its name. This file knows neither the loop nor
what the state means.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from dpojax.checksums import find_damage, seal
from dpojax.progress import busy

Note = dict[str, Any]  # what JSON can hold
_SMALL = 1 << 20  # bytes
_DAY = 86_400  # seconds; Orbax would give up after ten minutes


class Newest(NamedTuple):
    """The newest checkpoint that can be used."""

    step: int | None  # None: there is none
    damaged: dict[int, str]  # what is wrong with others, by their steps


def find_newest(directory: Path) -> Newest:
    """Looks at every byte of checkpoints, from the newest back to one that is whole.

    Of those before it, which are kept for worse times, only the small files are read:
    among them what Orbax reads of each to know which is the best.

    Raises:
      ValueError: if there are checkpoints, but none is whole.
    """
    whole, damaged = None, {}
    for step in sorted(steps_in(directory), reverse=True):
        hashed_below = float("inf") if whole is None else _SMALL
        damage = find_damage(directory / str(step), hashed_below)
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


def check_whole(directory: Path, step: int) -> None:
    """Looks at every byte of one checkpoint.

    Raises:
      ValueError: if it is not there, or damaged.
    """
    _check_step(step, sorted(steps_in(directory)), directory)
    damage = find_damage(directory / str(step))
    if damage is not None:
        raise ValueError(
            f"The checkpoint of step {step} in {directory} is damaged: {damage}; "
            "take another step, or put an intact copy back."
        )


def describe(damaged: dict[int, str]) -> str:
    """What is wrong with which checkpoint."""
    return "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())


def set_aside(directory: Path, steps: Iterable[int]) -> Path:
    """Moves checkpoints out of the way of new ones of their steps, and says where to.

    They are not removed: something of them may still be of use.
    """
    aside = directory.with_name(directory.name + ".damaged")
    aside.mkdir(exist_ok=True)
    for step in steps:
        number = sum(path.stem == str(step) for path in aside.iterdir())
        (directory / str(step)).rename(aside / f"{step}.{number}")
    return aside


def _check_step(step: int, steps: list[int], directory: Path) -> None:
    if step not in steps:
        raise ValueError(
            f"{directory} has no checkpoint of step {step}; "
            f"it has {', '.join(map(str, steps)) or 'none'}."
        )


def steps_in(directory: Path) -> list[int]:
    """The steps that a directory has checkpoints of, whole or not."""
    names = (path.name for path in directory.glob("*"))
    return [int(name) for name in names if name.isdecimal()]


class _Sealed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A directory that Orbax fills, and that is sealed before it takes its name."""

    async def finalize(self) -> None:
        store, self._checkpoint_metadata_store = self._checkpoint_metadata_store, None
        if store is not None:  # else it is a part of a checkpoint
            # Orbax writes its own file behind our back, and without the line above once
            # more. It still adds commit_success.txt, which nothing reads here.
            await asyncio.to_thread(store.wait_until_finished)
            name = self.get_final().name
            await asyncio.to_thread(seal, Path(self.get()), name)
        await super().finalize()


class Checkpoints:
    """The checkpoints of one run: the last few, and the best by evaluation loss."""

    def __init__(self, directory: Path, *, keep_last: int = 2, read_only: bool = False):
        """Opens the directory, which may be new unless it is only read."""
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
            temporary_path_class=_Sealed,
            async_options=ocp.AsyncOptions(timeout_secs=_DAY),
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of a run that was killed
        )
        self._directory = directory
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "note": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=options, item_handlers=handlers
        )

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, note: Note, loss: float | None) -> None:
        """Starts writing; training may go on at once.

        Args:
          step: number of steps taken.
          state: a pytree of arrays.
          note: what identifies the run.
          loss: the evaluation loss that decides which checkpoint is best, or None for
            a state that was not evaluated.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), note=ocp.args.JsonSave(note)
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
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
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
        try:
            yield
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            reason = reason or str(error).rsplit(": ", 1)[-1].split(" [")[0]
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
