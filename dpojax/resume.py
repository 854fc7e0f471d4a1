"""What makes a resumed run the same run: a note beside each checkpoint.

This file knows neither checkpoints nor the loop.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dpojax import __version__
from dpojax.config import TrainConfig
from dpojax.data.order import WINDOW


def make_note(
    config: TrainConfig,
    data_fingerprint: str,
    num_seen: int,
    reference_identity: str | None = None,
) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run.

    Args:
      config: the run's settings.
      data_fingerprint: of the training examples.
      num_seen: examples that the whole run sees.
      reference_identity: of a precomputed reference.
    """
    return {
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
        "version": __version__,
    }


def check_note(
    saved: Mapping[str, Any], note: Mapping[str, Any], directory: Path
) -> None:
    """Refuses to resume a run as another one.

    Raises:
      ValueError: naming the first setting that differs.
    """
    for name, value in note.items():
        # A checkpoint of an earlier version may not have the name yet.
        if name != "version" and saved.get(name) != value:
            raise ValueError(
                f"{directory} cannot be resumed with another {name}: it was "
                f"{saved.get(name)} and is now {value}; use its own config.py."
            )


def abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array, to restore it onto."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
