"""What of a step is not finite: each array's largest number, from weights to gradient.

What is not finite counts as infinite, so one number tells both how large an array is
and whether all of it is finite. This file knows the order in which a step computes, and
neither files nor what is said of the findings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dpojax.batch import Batch
from dpojax.gradient import (
    Running,
    as_judge,
    denominators,
    join_rows,
    judge,
    make_gradient,
    policy_numbers,
    split_rows,
    with_numbers,
)
from dpojax.losses.make import Loss
from dpojax.measure import Measure, Measured, Params
from dpojax.models.watch import magnitude
from dpojax.offloading import fetch
from dpojax.train_step import Roles, TrainState

STACKED = "blocks/"  # how paths of parameters begin whose first axis are layers

Trace = Callable[[Params, Batch], Float[Array, "stages rows length"]]
Sizes = dict[str, Array]  # by the path of a parameter: of each layer, or one number


class Findings(NamedTuple):
    """The largest magnitudes of what a step computes, in the order it computes it."""

    weights: Sizes  # of the policy, whatever of it is trained
    reference_weights: Sizes  # empty where none is in memory
    hidden: Float[Array, "rows slots stages"]  # of the policy
    reference_hidden: Float[Array, "rows slots stages"] | None
    log_probs: Float[Array, "rows slots"]
    reference_log_probs: Float[Array, "rows slots"] | None
    losses: Float[Array, "rows slots"]
    slopes: Float[Array, "rows slots"]  # of the loss, by what the policy gives
    gradient: Sizes
    gradient_norm: Float[Array, ""]


# (state, number of the step, what is frozen, batch) -> findings, jitted
Examine = Callable[[TrainState, Any, Any, Batch], Findings]


def make_examine(
    trace: Trace,
    measure: Measure,
    loss: Loss,
    roles: Roles,
    *,
    num_microbatches: int = 1,
    aux_loss_coefficient: float = 0.0,
    out_sharding: Any = None,
) -> Examine:
    """Builds the function that computes a step's parts once more, and keeps the sizes.

    Args:
      trace: the model's, see `dpojax.models.decoder.Model`.
      measure: of the step's own model and loss.
      loss: the step's.
      roles: the step's.
      num_microbatches: parts into which rows are split, as in the step.
      aux_loss_coefficient: the step's.
      out_sharding: of the findings; for many processes, such that each has all.

    Returns:
      ``examine(state, step, frozen, batch)``. The number is that of the steps before
      this one, and the state as it was then, whatever number it bears.
    """

    def measure_trained(trained: Params, others: tuple, batch: Batch) -> Measured:
        return measure(*roles(trained, *others), batch)

    take = make_gradient(
        measure_trained, as_judge(loss), num_microbatches, aux_loss_coefficient
    )

    def by_parts(function: Callable[[Batch], Any], batch: Batch) -> Any:
        """A function of rows, taken of as many at one time as the step takes."""
        found = jax.lax.map(function, split_rows(batch, num_microbatches))
        return jax.tree.map(join_rows, found)

    def hidden(params: Params, batch: Batch) -> Array:
        return by_parts(lambda part: _by_example(trace(params, part), part), batch)

    def examine(state: TrainState, step: Any, frozen: Any, batch: Batch) -> Findings:
        frozen = state.moving.get("reference", frozen)
        policy, reference = roles(state.params, frozen, step)
        measured = by_parts(lambda part: measure(policy, reference, part), batch)
        numbers = _numbers(loss, measured, batch, state.running)
        if numbers["reference_log_probs"] is None or batch.reference is not None:
            reference = None  # which nothing was computed with
        gradient, _, _ = take(state.params, (frozen, step), batch, state.running)
        return Findings(
            weights=_sizes(policy),
            reference_weights=_sizes(reference),
            hidden=hidden(policy, batch),
            reference_hidden=None if reference is None else hidden(reference, batch),
            gradient=_sizes(gradient),
            gradient_norm=optax.tree.norm(gradient),
            **numbers,
        )

    return jax.jit(examine, out_shardings=out_sharding)


def _numbers(
    loss: Loss, measured: Measured, batch: Batch, running: Running
) -> dict[str, Any]:
    """What becomes of the model's numbers; each is ``[rows, slots]``."""
    scores = measured.scores
    running = loss.update_running(running, scores)

    def value(numbers: dict[str, Array]) -> Array:
        seen, by = with_numbers(measured, numbers), denominators(batch)
        return judge(loss, seen, batch, running, by)[0]

    slopes = jax.grad(value)(policy_numbers(measured))
    slopes.pop("routing", None)  # of rows, not of examples
    losses, of_tokens = loss.total(loss(scores, running))
    if of_tokens is not None:
        losses += of_tokens
    live, present = jnp.asarray(batch.weight) > 0, scores.present

    def of_completions(*values: Array) -> Array:
        largest = [jnp.where(present, magnitude(value), 0.0) for value in values]
        return jnp.max(jnp.stack(largest), axis=(0, -1))

    return {
        "log_probs": of_completions(scores.policy),
        "reference_log_probs": None
        if scores.reference is None
        else of_completions(scores.reference),
        "losses": jnp.where(live, magnitude(losses), 0.0),
        "slopes": of_completions(*slopes.values()),
    }


def _by_example(sizes: Array, batch: Batch) -> Float[Array, "rows slots stages"]:
    """The largest over the positions of each example; 0 in an empty slot."""
    slots = 1 + jnp.arange(batch.completion_length.shape[1])
    own = jnp.asarray(batch.example)[:, None] == slots[:, None]  # rows, slots, length
    of_slots = jnp.where(own[None], sizes[:, :, None], 0.0)
    return jnp.moveaxis(jnp.max(of_slots, axis=-1), 0, -1)


def _sizes(tree: Params | None) -> Sizes:
    """The largest magnitude in each array of floats, and in each layer of stacked ones.

    Whole numbers, as quantised ones and the keys of dropout, are finite.
    """
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            within = range(name.startswith(STACKED), leaf.ndim)
            largest = jnp.max(magnitude(fetch(leaf)), axis=tuple(within))
            found[name] = largest.astype(jnp.float32)
    return found
