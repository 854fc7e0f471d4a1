"""What makes a resumed run the same run: where it goes on, and what must not differ.

This file does not know the loop.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dpojax.checkpoint import Place, describe, find_newest, set_aside
from dpojax.config import TrainConfig
from dpojax.data.order import WINDOW
from dpojax.processes import decided_by_first
from dpojax.progress import say
from dpojax.provenance import MADE_BY, difference, made_by


def find_step(checkpoints: Place) -> int:
    """The step of the newest whole checkpoint, or 0; damaged ones are set aside.

    Args:
      checkpoints: a directory, or gs://bucket/path.

    Raises:
      ValueError: if there are checkpoints, but none is whole.
    """

    def decide() -> str:
        step, damaged = find_newest(checkpoints)
        if damaged:
            aside = set_aside(checkpoints, damaged)
            say(f"Damaged checkpoints are now in {aside}: {describe(damaged)}.")
        return str(step or 0)

    return int(decided_by_first(decide))


def make_note(
    config: TrainConfig,
    data_fingerprint: str,
    num_seen: int,
    reference_identity: str | None = None,
) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run, and what made it.

    Args:
      config: the run's settings.
      data_fingerprint: of the training examples.
      num_seen: examples that the whole run sees.
      reference_identity: of a precomputed reference.
    """
    return made_by(config) | {
        "loss": repr(config.loss),
        "moving reference": repr(config.moving),
        "batch_size": config.batch_size,
        "examples_seen": num_seen,
        "seed": config.seed,
        "row_length": config.row_length,
        "window of examples": WINDOW,
        "compute_dtype": config.compute_dtype,
        "data": data_fingerprint,
        "optimizer": repr(config.optimizer),
        "reference": config.reference,
        "content of the reference": reference_identity,
        "LoRA": repr(config.lora),
        "model": config.model,
    }


def check_note(
    saved: Mapping[str, Any], note: Mapping[str, Any], directory: Path
) -> None:
    """Refuses to resume a run as another one; says what else made the saved part of it.

    Raises:
      ValueError: naming the first setting that differs.
    """
    for name, value in note.items():
        # A checkpoint of an earlier version may not have the name yet.
        if name not in (*MADE_BY, "facts") and saved.get(name) != value:
            raise ValueError(
                f"{directory} cannot be resumed with another {name}: it was "
                f"{saved.get(name)} and is now {value}; use its own config.py."
            )
    other = difference(saved, note)
    if other is not None:
        say(
            f"What {directory} holds was not made by the same: {other}; from here on "
            "its last digits may not be those of a run that was never stopped."
        )


def abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array, to restore it onto."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
