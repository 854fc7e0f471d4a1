"""Checkpoints by Orbax: asynchronous, sharded, whole or absent. Alone imports orbax.

A checkpoint is the state of training and a note about the run that made it. This file
knows neither the loop nor what the state means.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

Note = dict[str, Any]  # what JSON can hold


class Checkpoints:
    """The checkpoints of one run: the last few, and the best by evaluation loss."""

    def __init__(self, directory: Path, *, keep_last: int = 2):
        """Opens the directory, which may be new."""
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
            preservation_policy=policy, best_fn=_evaluation_loss, best_mode="min"
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
        self._manager.save(step, args=items, metrics=metrics)

    def restore(self, step: int, like: Any) -> Any:
        """Reads a state, or what of it is in `like`, onto the shardings of `like`.

        Args:
          step: one of `steps`.
          like: a pytree of abstract arrays with shardings.

        Raises:
          ValueError: if there is no such step, or its arrays are not those of `like`.
        """
        self._check_step(step)
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
        self._check_step(step)
        items = ocp.args.Composite(note=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["note"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _check_step(self, step: int) -> None:
        if step not in self.steps:
            raise ValueError(
                f"{self._directory} has no checkpoint of step {step}; "
                f"it has {', '.join(map(str, self.steps)) or 'none'}."
            )


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
