"""Everything that is jitted in training: the step, and the evaluation step.

A step is ``(state, reference, batch) -> (state, sums)``. It is given the model as a
function and the objective as a function of numbers, and knows neither files nor
configuration. Gradients and metrics are sums over microbatches and devices, divided
once, so the result does not depend on how the batch was split.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dpojax import metrics
from dpojax.batch import Batch
from dpojax.log_probs import completion_kl
from dpojax.losses.make import Loss
from dpojax.measure import Apply, Measured, Params, make_measure
from dpojax.metrics import Sums
from dpojax.outcome_metrics import outcome_sums
from dpojax.reference import Movement
from dpojax.routing import load_balancing_loss, over_rows
from dpojax.spread import ALONE, Spread
from dpojax.vocabulary.tiles import TILE

Running = dict[str, Any]
# (state, reference, batch) -> (state, sums), jitted
TrainStep = jax.stages.Wrapped
EvalStep = Callable[..., Sums]  # (params, reference, batch, running=...)
# (what is trained, what is frozen, step) -> parameters of policy and reference
Roles = Callable[[Params, Any, Array], tuple[Params, Params | None]]


class TrainState(NamedTuple):
    """What training changes, and a checkpoint keeps."""

    step: Int[Array, ""]
    params: Params  # what is trained: all weights, or adapters
    opt_state: optax.OptState
    running: Running = {}  # statistics of losses that carry any, by their names
    moving: dict[str, Params] = {}  # the reference, where it follows the policy


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    loss: Loss | None = None,
    moving: dict[str, Params] | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params: the policy.
      optimizer: its statistics start from these parameters.
      loss: the objective, where it carries statistics.
      moving: the state of a moving reference, by its `Movement.init`.
    """
    running = {} if loss is None else loss.initial_running()
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, optimizer.init(params), running, moving or {})


def all_weights(
    params: Params, reference: Params | None, step: Array
) -> tuple[Params, Params | None]:
    """The roles where the whole policy is trained; what is frozen is the reference."""
    return params, reference


def make_train_step(
    apply: Apply,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    chunk_size: int = 512,
    tile_size: int = TILE,
    spread: Spread = ALONE,
    movement: Movement | None = None,
    roles: Roles = all_weights,
    aux_loss_coefficient: float = 0.0,
    state_shardings: Any = None,
    rows_sharding: Any = None,
) -> TrainStep:
    """Builds the jitted step.

    Args:
      apply: the model: parameters and batch to hidden states and output matrix.
      loss: the objective.
      optimizer: its update ends in the change of the parameters.
      num_microbatches: parts into which the rows are split, one after another. The
        result is that of the whole batch, for losses that look at all of it too: these
        cost one more forward pass then.
      chunk_size: positions of each shard whose logits exist at one time.
      tile_size: tokens of the vocabulary whose logits do.
      spread: the mesh that rows and output matrix are divided over.
      movement: how the reference follows the policy; the step's own argument is None
        then, since the state holds it.
      roles: how what is trained and what is frozen make the policy and the reference;
        for adapters see `dpojax.models.lora.make_roles`.
      aux_loss_coefficient: how much the load-balancing loss of the model's routers
        counts beside the mean loss. It looks at the whole batch, so microbatches cost
        one more forward pass then.
      state_shardings: a sharding for each array of the state. Given, the compiler
        cannot move an array between steps and compile again for the next.
      rows_sharding: the sharding of a batch.

    Returns:
      ``train_step(state, reference, batch) -> (state, sums)``. The state is donated;
      the reference, parameters or None or what `roles` takes, never is. Gradients are
      of the mean loss over the whole batch; ``grad_norm``: their norm before clipping.
      Where the model has experts, ``aux_loss`` is their routers' load-balancing loss
      over the real tokens of the batch, whether it counts or not; ``loss`` is without.
    """
    measure = make_measure(apply, loss.needs, chunk_size=chunk_size, spread=spread)

    def measure_trained(trained: Params, others: tuple, batch: Batch) -> Measured:
        return measure(*roles(trained, *others), batch)

    gradient = _make_gradient(
        measure_trained, loss, num_microbatches, aux_loss_coefficient
    )

    def train_step(
        state: TrainState, reference: Params | None, batch: Batch
    ) -> tuple[TrainState, Sums]:
        frozen = reference if movement is None else state.moving["reference"]
        grads, sums, running = gradient(
            state.params, (frozen, state.step), batch, state.running
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step, moving = state.step + 1, state.moving
        if movement is not None:
            moving = movement.update(moving, params, step)
        sums["grad_norm"] = metrics.Ratio(optax.tree.norm(grads), jnp.ones(()))
        if "aux_loss" in sums:  # of this step's tokens, not of those of several steps
            balance = load_balancing_loss(sums["aux_loss"])
            sums["aux_loss"] = metrics.Ratio(balance, jnp.ones(()))
        return TrainState(step, params, opt_state, running, moving), sums

    if state_shardings is None:
        return jax.jit(train_step, donate_argnums=0)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, None, rows_sharding),
        out_shardings=(state_shardings, None),
    )


def make_eval_step(
    apply: Apply,
    loss: Loss,
    *,
    chunk_size: int = 512,
    spread: Spread = ALONE,
) -> EvalStep:
    """Builds ``eval_step(params, reference, batch, running={}) -> sums``, jitted.

    Statistics that a loss carries are used as they are, and not changed. Of a model
    with experts, ``aux_loss`` is that of the tokens of all batches together.
    """
    measure = make_measure(apply, loss.needs, chunk_size=chunk_size, spread=spread)

    def eval_step(
        params: Params,
        reference: Params | None,
        batch: Batch,
        running: Running | None = None,
    ) -> Sums:
        measured = measure(params, reference, batch)
        running = loss.initial_running() if running is None else running
        return _judge(loss, measured, batch, running, _denominators(batch))[1]

    return jax.jit(eval_step)


def make_kl_step(
    apply: Apply, *, chunk_size: int = 512, spread: Spread = ALONE
) -> EvalStep:
    """Builds ``kl_step(params, reference, batch) -> sums``, jitted.

    On completions sampled from the policy, the mean of ``kl`` estimates the
    sequence-level KL(policy || reference), in nats.
    """

    def kl_step(params: Params, reference: Params | None, batch: Batch) -> Sums:
        policy, frozen = apply(params, batch), apply(reference, batch)
        kl = completion_kl(policy, frozen, batch, chunk_size=chunk_size, spread=spread)
        return {"kl": metrics.moments(kl[..., 0], jnp.asarray(batch.live))}

    return jax.jit(kl_step)


class _Denominators(NamedTuple):
    """What a batch's losses are divided by; known before any is computed."""

    examples: Float[Array, ""]
    tokens: Float[Array, ""]


def _denominators(batch: Batch) -> _Denominators:
    weight = jnp.asarray(batch.weight)
    tokens = jnp.sum(weight * batch.completion_length[..., 0])
    tiny = jnp.finfo(weight.dtype).tiny  # an empty batch has loss 0, not NaN
    return _Denominators(jnp.maximum(jnp.sum(weight), tiny), jnp.maximum(tokens, tiny))


def _judge(
    loss: Loss, measured: Measured, batch: Batch, running: Running, by: _Denominators
) -> tuple[Array, Sums]:
    """The loss of a batch or of a part of it, already divided, and every metric."""
    scores, routing = measured
    outcomes = loss(scores, running)
    weight = jnp.asarray(batch.weight)
    examples, tokens = loss.total(outcomes)
    # What stands in an empty slot may be no number; times 0 it would remain none.
    live = weight > 0
    value = jnp.sum(weight * jnp.where(live, examples, 0.0)) / by.examples
    if tokens is not None:
        value += jnp.sum(weight * jnp.where(live, tokens, 0.0)) / by.tokens
    sums = outcome_sums(loss, outcomes, scores, weight)
    return value, sums if routing is None else sums | {"aux_loss": over_rows(routing)}


def _make_gradient(
    measure: Callable, loss: Loss, num_parts: int, aux_loss_coefficient: float
) -> Callable[..., Any]:
    """``(params, others, batch, running) -> (gradient, sums, running)``.

    `measure` takes the first three; the gradient is by the first.
    """

    def judged(
        measured: Measured, batch: Batch, running: Running, by: _Denominators
    ) -> tuple[Array, tuple[Sums, Running]]:
        constant = jax.lax.stop_gradient(measured.scores)
        running = loss.update_running(running, constant)
        value, sums = _judge(loss, measured, batch, running, by)
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
        grads, aux = take(params, others, batch, running, _denominators(batch))
        return grads, *aux

    def part_by_part(
        params: Params, others: Any, batch: Batch, running: Running
    ) -> tuple[Params, Sums, Running]:
        by = _denominators(batch)
        take = jax.grad(of_part, has_aux=True)

        def one(part: Batch) -> tuple[Params, Sums]:
            grads, (sums, _) = take(params, others, part, running, by)
            return grads, sums

        return *_sum_over(one, _split_rows(batch, num_parts)), running

    def through_scores(
        params: Params, others: Any, batch: Batch, running: Running
    ) -> tuple[Params, Sums, Running]:
        """By the chain rule: all scores, their gradients, then each part's share."""
        parts = _split_rows(batch, num_parts)
        measured = jax.lax.map(lambda part: measure(params, others, part), parts)
        measured = jax.tree.map(_join_rows, measured)

        def of_numbers(numbers: dict[str, Array]) -> tuple[Array, tuple]:
            replaced = _with_numbers(measured, numbers)
            return judged(replaced, batch, running, _denominators(batch))

        take = jax.grad(of_numbers, has_aux=True)
        slopes, (sums, after) = take(_policy_numbers(measured))
        slopes = _split_rows(slopes, num_parts)

        def product(params: Params, part: Batch, slope: dict[str, Array]) -> Any:
            numbers = _policy_numbers(measure(params, others, part))
            return sum(jnp.sum(slope[name] * numbers[name]) for name in slope)

        grads = _sum_over(lambda two: jax.grad(product)(params, *two), (parts, slopes))
        return grads, sums, after

    if num_parts == 1:
        return whole
    whole_batch = loss.batchwise or aux_loss_coefficient != 0
    return through_scores if whole_batch else part_by_part


def _policy_numbers(measured: Measured) -> dict[str, Array]:
    """The numbers through which the policy's parameters get a gradient."""
    names = ("policy", "policy_prefix", "token_kl")
    numbers = measured.scores._asdict()
    found = {name: numbers[name] for name in names if numbers[name] is not None}
    if measured.routing is not None:
        found["routing"] = measured.routing.probability
    return found


def _with_numbers(measured: Measured, numbers: dict[str, Array]) -> Measured:
    """The same with other numbers, as `_policy_numbers` gives them."""
    scores = {name: value for name, value in numbers.items() if name != "routing"}
    routing = measured.routing
    if routing is not None:
        routing = routing._replace(probability=numbers["routing"])
    return Measured(measured.scores._replace(**scores), routing)


def _sum_over(function: Callable[[Any], Any], parts: Any) -> Any:
    """The sum of a function over the first axis of its argument, one after another."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _split_rows(tree: Any, num_parts: int) -> Any:
    """Rows ``[rows, ...]`` to ``[parts, rows / parts, ...]``.

    Part m takes rows m, m + parts, ...: each device's block of rows gives every part
    the same share, so no row moves between devices.
    """

    def split(array: Array) -> Array:
        array = jnp.asarray(array)
        return array.reshape(-1, num_parts, *array.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _join_rows(array: Array) -> Array:
    """``[parts, rows / parts, ...]`` to rows again, in the order before the split."""
    return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])
