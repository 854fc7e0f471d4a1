"""What is measured, as sums that add up over microbatches and devices.

A metric is a numerator and a denominator until it is printed: the mean over a batch
does not depend on how the batch was split. Names are TRL's where TRL has one. Three
definitions differ: a tie counts one half in ``rewards/accuracies`` (TRL: nothing, so
that a fresh policy starts at 0), rewards of an empty slot count nowhere, and ``loss``
is without the ``aux_loss`` of routers, whether that is trained on or not.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dpojax.routing import Routing, load_balancing_loss


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


class MeanDifference(NamedTuple):
    """Enough of two samples for the difference of their means."""

    first: Moments
    second: Moments


class LossSums(NamedTuple):
    """A loss: a weighted mean over examples, plus a mean over tokens."""

    examples: Moments
    tokens: Ratio


Metric = Ratio | Moments | Correlation | MeanDifference | LossSums | Routing
Sums = dict[str, Any]  # of Metric


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


def margin_sums(
    margin: Float[Array, "*batch"],
    length_difference: Int[Array, "*batch"],
    live: Bool[Array, "*batch"],
) -> Sums:
    """Differences of rewards, how many are right, and how far they follow length."""
    lengths = length_difference.astype(jnp.float32)
    return {
        "rewards/margins": moments(margin, live),
        "rewards/accuracies": moments((1 + jnp.sign(margin)) / 2, live),
        "rewards/length_correlation": correlation(lengths, margin, live),
    }


def loss_sums(
    loss: Float[Array, "*batch"],
    token_loss: Float[Array, "*batch"] | None,
    weight: Float[Array, "*batch"],
    num_tokens: Int[Array, "*batch"],
) -> LossSums:
    """Sums of a loss.

    Args:
      loss: of each example.
      token_loss: a second part, summed over each example's tokens.
      weight: how much each example counts; 0 where there is none.
      num_tokens: of each example, what the second part is averaged over.
    """
    live = weight > 0
    loss = jnp.where(live, loss, 0.0)
    examples = Moments(
        jnp.sum(weight * loss), jnp.sum(weight), jnp.sum(weight * loss**2)
    )
    if token_loss is None:
        return LossSums(examples, Ratio(jnp.zeros(()), jnp.zeros(())))
    total = jnp.sum(weight * jnp.where(live, token_loss, 0.0))
    return LossSums(examples, Ratio(total, jnp.sum(weight * num_tokens)))


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
            case Routing():
                values[name] = float(load_balancing_loss(entry))
            case Correlation():
                values[name] = _pearson(entry)
            case MeanDifference(first, second):
                means = (_quotient(part.total, part.count) for part in entry)
                values[name] = next(means) - next(means)
                errors = _standard_error(first), _standard_error(second)
                values[name + "_se"] = float(np.hypot(*errors))
            case LossSums(examples, tokens):
                values[name] = _quotient(examples.total, examples.count)
                values[name + "_se"] = _standard_error(examples)
                if tokens.count:
                    # Tokens of one completion are no independent sample.
                    del values[name + "_se"]
                    values[name] += _quotient(tokens.total, tokens.count)
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
