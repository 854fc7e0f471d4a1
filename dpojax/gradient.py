"""The gradient of a batch's loss: at once, part by part, or through all its scores.

Every loss and metric is a sum, divided once by what the whole batch says, so that the
result does not depend on how the batch was split. This file knows no optimiser.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.batch import Batch
from dpojax.losses.make import Loss
from dpojax.losses.objective import Need
from dpojax.losses.scores import Scores
from dpojax.measure import Measured, Params
from dpojax.metrics import Sums
from dpojax.outcome_metrics import outcome_sums, token_metric_sums
from dpojax.routing import load_balancing_loss, over_rows

Running = dict[str, Any]  # statistics that losses carry, by their names


class Denominators(NamedTuple):
    """What a batch's losses are divided by; known before any is computed."""

    examples: Float[Array, ""]
    tokens: Float[Array, ""]


def denominators(batch: Batch) -> Denominators:
    """Those of a whole batch."""
    weight = jnp.asarray(batch.weight)
    tokens = jnp.sum(weight * batch.completion_length[..., 0])
    tiny = jnp.finfo(weight.dtype).tiny  # an empty batch has loss 0, not NaN
    return Denominators(jnp.maximum(jnp.sum(weight), tiny), jnp.maximum(tokens, tiny))


class Judge(NamedTuple):
    """An objective as a step sees it: of a batch's numbers, a loss and metrics."""

    needs: frozenset[Need]
    batchwise: bool  # whether an example's loss depends on the others of its batch
    # (measured, batch, running, denominators) -> loss, already divided, and metrics
    judge: Callable[[Measured, Batch, Running, Denominators], tuple[Array, Sums]]
    # (running, scores) -> running, after a batch was seen
    update_running: Callable[[Running, Scores], Running]


def as_judge(loss: Loss) -> Judge:
    """One objective, always the same."""
    return Judge(loss.needs, loss.batchwise, partial(judge, loss), loss.update_running)


def judge(
    loss: Loss, measured: Measured, batch: Batch, running: Running, by: Denominators
) -> tuple[Array, Sums]:
    """The loss of a batch or of a part of it, already divided, and every metric."""
    scores, routing, token_sums = measured
    outcomes = loss(scores, running)
    weight = jnp.asarray(batch.weight)
    examples, tokens = loss.total(outcomes)
    # What stands in an empty slot may be no number; times 0 it would remain none.
    live = weight > 0
    value = jnp.sum(weight * jnp.where(live, examples, 0.0)) / by.examples
    if tokens is not None:
        value += jnp.sum(weight * jnp.where(live, tokens, 0.0)) / by.tokens
    sums = outcome_sums(loss, outcomes, scores, weight)
    sums |= token_metric_sums(loss, token_sums, jnp.asarray(batch.completion_length))
    return value, sums if routing is None else sums | {"aux_loss": over_rows(routing)}


def make_gradient(
    measure: Callable, objective: Judge, num_parts: int, aux_loss_coefficient: float
) -> Callable[..., Any]:
    """Builds ``(params, others, batch, running) -> (gradient, sums, running)``.

    Args:
      measure: takes the first three; the gradient is by the first.
      objective: what the numbers are worth.
      num_parts: parts into which the rows are split, one after another.
      aux_loss_coefficient: how much the load-balancing loss of routers counts.
    """

    def judged(
        measured: Measured, batch: Batch, running: Running, by: Denominators
    ) -> tuple[Array, tuple[Sums, Running]]:
        constant = jax.lax.stop_gradient(measured.scores)
        running = objective.update_running(running, constant)
        value, sums = objective.judge(measured, batch, running, by)
        if aux_loss_coefficient != 0:
            if measured.routing is None:
                raise ValueError(
                    f"aux_loss_coefficient is {aux_loss_coefficient}, but the model "
                    "has no routers; leave it 0."
                )
            value += aux_loss_coefficient * load_balancing_loss(sums["aux_loss"])
        return value, (sums, running)

    def of_part(
        params: Params, others: Any, part: Batch, running: Running, by: Any
    ) -> Any:
        return judged(measure(params, others, part), part, running, by)

    def whole(
        params: Params, others: Any, batch: Batch, running: Running
    ) -> tuple[Params, Sums, Running]:
        take = jax.grad(of_part, has_aux=True)
        grads, aux = take(params, others, batch, running, denominators(batch))
        return grads, *aux

    def part_by_part(
        params: Params, others: Any, batch: Batch, running: Running
    ) -> tuple[Params, Sums, Running]:
        by = denominators(batch)
        take = jax.grad(of_part, has_aux=True)

        def one(part: Batch) -> tuple[Params, Sums]:
            grads, (sums, _) = take(params, others, part, running, by)
            return grads, sums

        return *_sum_over(one, split_rows(batch, num_parts)), running

    def through_scores(
        params: Params, others: Any, batch: Batch, running: Running
    ) -> tuple[Params, Sums, Running]:
        """By the chain rule: all scores, their gradients, then each part's share."""
        parts = split_rows(batch, num_parts)
        measured = jax.lax.map(lambda part: measure(params, others, part), parts)
        measured = jax.tree.map(join_rows, measured)

        def of_numbers(numbers: dict[str, Array]) -> tuple[Array, tuple]:
            replaced = with_numbers(measured, numbers)
            return judged(replaced, batch, running, denominators(batch))

        take = jax.grad(of_numbers, has_aux=True)
        slopes, (sums, after) = take(policy_numbers(measured))
        slopes = split_rows(slopes, num_parts)

        def product(params: Params, part: Batch, slope: dict[str, Array]) -> Any:
            numbers = policy_numbers(measure(params, others, part))
            return sum(jnp.sum(slope[name] * numbers[name]) for name in slope)

        grads = _sum_over(lambda two: jax.grad(product)(params, *two), (parts, slopes))
        return grads, sums, after

    if num_parts == 1:
        return whole
    whole_batch = objective.batchwise or aux_loss_coefficient != 0
    return through_scores if whole_batch else part_by_part


def policy_numbers(measured: Measured) -> dict[str, Array]:
    """The numbers through which the policy's parameters get a gradient."""
    names = ("policy", "policy_prefix", "token_kl")
    numbers = measured.scores._asdict()
    found = {name: numbers[name] for name in names if numbers[name] is not None}
    if measured.routing is not None:
        found["routing"] = measured.routing.probability
    return found


def with_numbers(measured: Measured, numbers: dict[str, Array]) -> Measured:
    """The same with other numbers, as `policy_numbers` gives them."""
    scores = {name: value for name, value in numbers.items() if name != "routing"}
    routing = measured.routing
    if routing is not None:
        routing = routing._replace(probability=numbers["routing"])
    replaced = measured.scores._replace(**scores)
    return measured._replace(scores=replaced, routing=routing)


def _sum_over(function: Callable[[Any], Any], parts: Any) -> Any:
    """The sum of a function over the first axis of its argument, one after another."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def split_rows(tree: Any, num_parts: int) -> Any:
    """Rows ``[rows, ...]`` to ``[parts, rows / parts, ...]``.

    Part m takes rows m, m + parts, ...: each device's block of rows gives every part
    the same share, so no row moves between devices.
    """

    def split(array: Array) -> Array:
        array = jnp.asarray(array)
        return array.reshape(-1, num_parts, *array.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def join_rows(array: Array) -> Array:
    """``[parts, rows / parts, ...]`` to rows again, in the order before the split."""
    return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])
