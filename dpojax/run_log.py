"""What a run says while it goes: its beginning, its figures, and a number that is none.

This file knows neither the model nor the loop.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpojax import metrics
from dpojax.config import TrainConfig

_SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logratios/chosen": "chosen log-ratio",
    "logratios/rejected": "rejected log-ratio",
    "grad_norm": "gradient",
    "tokens_per_second": "tokens/s",
}


def drain(pending: list[tuple[int, metrics.Sums]]) -> dict[str, float]:
    """The means over the steps since the last call, which are forgotten.

    Args:
      pending: each step's number and its sums.

    Raises:
      FloatingPointError: naming the step whose loss or gradient is not finite.
    """
    steps = jax.device_get(pending)
    pending.clear()
    for step, sums in steps:
        values = metrics.summarize({name: sums[name] for name in ("loss", "grad_norm")})
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise FloatingPointError(
                    f"The {name} of step {step} is {values[name]}; the run stops here. "
                    "Its last checkpoint is from before this step."
                )

    def add(*parts: np.ndarray) -> Any:
        return np.sum(parts, axis=0, dtype=np.float64)

    return metrics.summarize(jax.tree.map(add, *(sums for _, sums in steps)))


def num_parameters(params: Any) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def summary(
    config: TrainConfig,
    counts: tuple[int, int],
    num_train: int,
    num_test: int,
    num_steps: int,
    mesh: Mapping[str, int],
) -> str:
    """One line before the first step; `counts`: of parameters, trained and in all."""
    trained, every = counts
    share = "" if trained == every else f"{trained:,} of "
    axes = ", ".join(f"{name} {size}" for name, size in mesh.items() if size > 1)
    return (
        f"{config.loss.name} of {config.model}: {share}{every:,} parameters, "
        f"{num_train:,} training and {num_test:,} test examples, {num_steps:,} steps "
        f"of {config.batch_size} on {jax.device_count()} {jax.default_backend()} "
        f"device(s) {axes}".rstrip()
    )


def figures_line(start: str, values: Mapping[str, float]) -> str:
    """The figures that matter, each with its label, after a word of which they are."""
    shown = [
        f"{label} {values[name]:.4g}"
        for name, label in _SHOWN.items()
        if name in values
    ]
    return "  ".join([start, *shown]).strip()
