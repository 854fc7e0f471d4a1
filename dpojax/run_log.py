"""What a run says while it goes: its beginning and its figures.

This file knows neither the model nor the loop.
"""

from collections.abc import Mapping
from typing import Any

import jax

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
