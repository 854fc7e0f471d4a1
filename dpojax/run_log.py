"""What a run says while it goes: its beginning and its figures.

This file knows neither the model nor the loop.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from dpojax.config import TrainConfig
from dpojax.losses.make import Loss, Term, defaults_of
from dpojax.progress import duration

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


class Plan(NamedTuple):
    """What a summary tells that settings do not."""

    loss: Loss
    state: Any  # of training, arrays or their shapes with shardings
    others: Any  # what else is in the devices' memory: the base, the reference
    num_trained: int  # parameters
    num_parameters: int  # all of the model's
    num_train: int  # examples
    num_test: int
    num_steps: int
    learning_rate: float  # the largest
    mesh: Mapping[str, int]
    shape: tuple[int, ...]  # of a batch: rows, positions
    num_tokens: int  # of the first batch


def summary(config: TrainConfig, plan: Plan) -> str:
    """What is about to be done: a label and its values on each line."""
    rows, positions = plan.shape
    padding = 1 - plan.num_tokens / (rows * positions)
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1)
    parts = {
        "model": config.model,
        "parameters": f"{plan.num_trained:,} trained of {plan.num_parameters:,}",
        "loss": "; ".join(map(_described, plan.loss.terms)),
        "optimiser": f"{config.optimizer.name}, learning rate {plan.learning_rate:.3g} "
        f"at most, {config.optimizer.schedule}",
        "reference": _reference(config, plan.loss),
        "examples": f"{plan.num_train:,} training, {plan.num_test:,} test",
        "rows": f"{rows:,} of {positions:,} positions a step, in "
        f"{config.microbatches} part(s); {padding:.1%} padding in the first",
        "steps": f"{plan.num_steps:,} of {config.batch_size} examples; "
        f"{plan.num_tokens:,} tokens in the first",
        "devices": f"{jax.device_count()} {jax.default_backend()}"
        + (f", mesh {axes}" if axes else ""),
        "memory": f"{_gib(device_bytes((plan.state, plan.others)))} a device for state "
        "and reference; activations come on top",
        "precision": f"activations {config.compute_dtype or 'by default'}, trained "
        f"{_dtypes(plan.state.params)}",
    }
    return "\n".join(f"  {label:<10}  {value}" for label, value in parts.items())


def device_bytes(tree: Any) -> int:
    """What arrays take of one device; one that occurs twice is counted once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in leaves.values()
    )


def _described(term: Term) -> str:
    settings = defaults_of(term.objective) | dict(term.settings) | dict(term.modifiers)
    values = ", ".join(f"{name} {value}" for name, value in settings.items())
    weight = "" if term.weight == 1 else f"{term.weight:g} * "
    return f"{weight}{term.name}" + (f" ({values})" if values else "")


def _reference(config: TrainConfig, loss: Loss) -> str:
    if "reference" not in loss.needs:
        return "none is needed"
    moves = "" if config.moving.kind == "none" else f", moved by {config.moving.kind}"
    return (config.reference or "the policy at step 0") + moves


def _dtypes(tree: Any) -> str:
    return ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(tree)}))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def time_line(seconds: float | None) -> str:
    """What is left, where enough was measured to say so."""
    return "" if seconds is None else f"  left {duration(seconds)}"


def figures_line(start: str, values: Mapping[str, float]) -> str:
    """The figures that matter, each with its label, after a word of which they are."""
    shown = [
        f"{label} {values[name]:.4g}"
        for name, label in _SHOWN.items()
        if name in values
    ]
    return "  ".join([start, *shown]).strip()
