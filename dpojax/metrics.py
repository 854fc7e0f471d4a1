"""What is measured, as sums that add up over microbatches and devices; where it goes.

A metric is a numerator and a denominator until it is printed: the mean over a batch
does not depend on how the batch was split. Names are TRL's where TRL has one. Two
definitions differ: a tie counts one half in ``rewards/accuracies`` (TRL: nothing, so
that a fresh policy starts at 0), and rewards of an empty slot count nowhere.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Ratio(NamedTuple):
    """A quotient of sums."""

    total: Array
    count: Array


class Moments(NamedTuple):
    """Enough of a sample for its mean and the mean's standard error."""

    total: Array
    count: Array
    squares: Array


class Correlation(NamedTuple):
    """Enough of paired samples for Pearson's correlation."""

    count: Array
    x: Array
    y: Array
    xx: Array
    yy: Array
    xy: Array


Sums = dict[str, Ratio | Moments | Correlation]


def moments(values: Float[Array, "*batch"], where: Bool[Array, "*batch"]) -> Moments:
    """Sums over the entries that count."""
    values = jnp.where(where, values, 0.0)
    return Moments(jnp.sum(values), jnp.sum(where), jnp.sum(values**2))


def correlation(
    x: Float[Array, "*batch"], y: Float[Array, "*batch"], where: Bool[Array, "*batch"]
) -> Correlation:
    """Sums over the entries that count."""
    x, y = jnp.where(where, x, 0.0), jnp.where(where, y, 0.0)
    sums = (jnp.sum(term) for term in (x, y, x * x, y * y, x * y))
    return Correlation(jnp.sum(where), *sums)


def completion_sums(
    name: str,
    log_prob: Float[Array, "*batch"],
    length: Int[Array, "*batch"],
    live: Bool[Array, "*batch"],
) -> Sums:
    """Log-probabilities and lengths of the completions called `name`."""
    return {
        f"logps/{name}": moments(log_prob, live),
        f"logps/{name}_per_token": moments(log_prob / jnp.maximum(length, 1), live),
        f"lengths/{name}": moments(length.astype(jnp.float32), live),
    }


def reward_sums(
    chosen_reward: Float[Array, "*batch"],
    rejected_reward: Float[Array, "*batch"],
    length_difference: Int[Array, "*batch"],
    live: Bool[Array, "*batch"],
) -> Sums:
    """Implicit rewards of pairs, and how far their margin follows length."""
    margin = chosen_reward - rejected_reward
    lengths = length_difference.astype(jnp.float32)
    return {
        "rewards/chosen": moments(chosen_reward, live),
        "rewards/rejected": moments(rejected_reward, live),
        "rewards/margins": moments(margin, live),
        "rewards/accuracies": moments((1 + jnp.sign(margin)) / 2, live),
        "rewards/length_correlation": correlation(lengths, margin, live),
    }


def log_ratio_sums(
    chosen: Float[Array, "*batch"],
    rejected: Float[Array, "*batch"],
    live: Bool[Array, "*batch"],
) -> Sums:
    """Log-ratios to the reference; a falling chosen one is likelihood displacement."""
    return {
        "logratios/chosen": moments(chosen, live),
        "logratios/rejected": moments(rejected, live),
        "logratios/chosen_negative": moments((chosen < 0).astype(jnp.float32), live),
    }


def add(first: Sums, second: Sums) -> Sums:
    """Sums of two disjoint sets of examples."""
    return jax.tree.map(jnp.add, first, second)


def summarize(sums: Mapping[str, Any]) -> dict[str, float]:
    """Divides once, on the host: means, and with ``_se`` their standard errors."""
    values: dict[str, float] = {}
    for name, entry in jax.device_get(dict(sums)).items():
        match entry:
            case Moments():
                values[name] = _quotient(entry.total, entry.count)
                values[name + "_se"] = _standard_error(entry)
            case Ratio():
                values[name] = _quotient(entry.total, entry.count)
            case Correlation():
                values[name] = _pearson(entry)
    return values


def _quotient(total: Any, count: Any) -> float:
    return float(total) / float(count) if count else float("nan")


def _standard_error(entry: Moments) -> float:
    count = float(entry.count)
    if count < 2:
        return float("nan")
    mean = float(entry.total) / count
    variance = max(0.0, float(entry.squares) / count - mean**2)
    return float(np.sqrt(variance / (count - 1)))


def _pearson(entry: Correlation) -> float:
    count, x, y, xx, yy, xy = (float(value) for value in entry)
    if not count:
        return float("nan")
    spread = (xx - x * x / count) * (yy - y * y / count)
    # Constant lengths or margins, as at step 0, have no correlation to speak of.
    return (xy - x * y / count) / np.sqrt(spread) if spread > 0 else 0.0


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, in the order of the steps."""

    def __init__(self, path: Path, keep_until: int):
        """Opens the file; lines after that step are dropped, since they come again."""
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.split("\n")[:-1]  # a line cut short by a crash has no end
        kept = [line for line in lines if json.loads(line)["step"] <= keep_until]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends a line; numbers that are not finite become null."""
        finite = {k: v if np.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": step, "split": split} | finite, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
