"""Everything that is jitted in training: the step, and the evaluation step.

A step is ``(state, reference, batch) -> (state, sums)``. It is given the model as a
function and the objective as a function of numbers, and knows neither files nor
configuration. Gradients and metrics are sums over microbatches and devices, divided
once, so the result does not depend on how the batch was split.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from dpojax import metrics
from dpojax.batch import Batch
from dpojax.gradient import (
    Judge,
    Running,
    as_judge,
    denominators,
    judge,
    make_gradient,
)
from dpojax.guard import OnNan, choose, hold, is_finite
from dpojax.log_probs import completion_kl
from dpojax.losses.make import Loss
from dpojax.measure import (
    Apply,
    Measure,
    Measured,
    Params,
    TokenMetric,
    make_measure,
)
from dpojax.metrics import Sums
from dpojax.outcome_metrics import example_figures
from dpojax.reference import Movement
from dpojax.routing import load_balancing_loss
from dpojax.spread import ALONE, Spread
from dpojax.vocabulary.tiles import TILE

# (state, reference, batch) -> (state, sums), jitted
TrainStep = jax.stages.Wrapped
# (params, reference, batch, running=...) -> (sums, figures of each example), jitted
EvalStep = Callable[..., tuple[Sums, Sums]]
# (what is trained, what is frozen, step) -> parameters of policy and reference
Roles = Callable[[Params, Any, Array], tuple[Params, Params | None]]
# Brings the optimiser's state to the devices and back
Around = Callable[
    [optax.GradientTransformationExtraArgs], optax.GradientTransformationExtraArgs
]


class TrainState(NamedTuple):
    """What training changes, and a checkpoint keeps."""

    step: Int[Array, ""]
    # Whether a step was not finite, and nothing has changed since: see `on_nan`.
    halted: Bool[Array, ""]
    params: Params  # what is trained: all weights, or adapters
    opt_state: optax.OptState
    running: Running = {}  # statistics of losses that carry any, by their names
    moving: dict[str, Params] = {}  # the reference, where it follows the policy


# (state, reference, batch) -> (state, sums), not jitted
Update = Callable[[TrainState, Any, Batch], tuple[TrainState, Sums]]


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
    step, halted = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    opt_state = optimizer.init(params)
    return TrainState(step, halted, params, opt_state, running, moving or {})


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
    token_metrics: Collection[TokenMetric] = (),
    chunk_size: int = 512,
    tile_size: int = TILE,
    spread: Spread = ALONE,
    movement: Movement | None = None,
    roles: Roles = all_weights,
    aux_loss_coefficient: float = 0.0,
    on_nan: OnNan = "stop",
    around: Around = lambda optimizer: optimizer,
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
      token_metrics: what to measure over the tokens of completions too.
      chunk_size: positions of each shard whose logits exist at one time.
      tile_size: tokens of the vocabulary whose logits do.
      spread: the mesh that rows and output matrix are divided over.
      movement: see `make_update`, as for all up to `around`.
      roles: likewise.
      aux_loss_coefficient: likewise.
      on_nan: likewise.
      around: likewise.
      state_shardings: see `jit_step`.
      rows_sharding: likewise.

    Returns:
      What `jit_step` makes of `make_update`.
    """
    measure = make_measure(
        apply,
        loss.needs,
        token_metrics=token_metrics,
        chunk_size=chunk_size,
        tile_size=tile_size,
        spread=spread,
    )
    update = make_update(
        measure,
        as_judge(loss),
        optimizer,
        num_microbatches=num_microbatches,
        movement=movement,
        roles=roles,
        aux_loss_coefficient=aux_loss_coefficient,
        on_nan=on_nan,
        around=around,
    )
    return jit_step(update, state_shardings, rows_sharding)


def make_update(
    measure: Measure,
    objective: Judge,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    movement: Movement | None = None,
    roles: Roles = all_weights,
    aux_loss_coefficient: float = 0.0,
    on_nan: OnNan = "stop",
    around: Around = lambda optimizer: optimizer,
) -> Update:
    """Builds a step that is not jitted, so that it can be mapped over many states.

    Args:
      measure: the model's numbers of a batch.
      objective: what these are worth.
      optimizer: its update ends in the change of the parameters.
      num_microbatches: see `make_train_step`.
      movement: how the reference follows the policy; the step's own argument is None
        then, since the state holds it.
      roles: how what is trained and what is frozen make the policy and the reference;
        for adapters see `dpojax.models.lora.make_roles`.
      aux_loss_coefficient: how much the load-balancing loss of the model's routers
        counts beside the mean loss. It looks at the whole batch, so microbatches cost
        one more forward pass then.
      on_nan: what a step does whose loss or gradient is not finite. With ``"skip"`` it
        leaves parameters, the optimiser's statistics and the loss's as they were; the
        number of the step, and with it the data, the schedule and a moving reference,
        goes on. With ``"stop"`` no step after it changes the parameters, and the state
        is `halted`: whoever drives the steps can find out later, and look at what the
        step saw. The optimiser's statistics are no numbers then.
      around: brings the optimiser's state to the devices and back, see
        `dpojax.offloading.fetch_state`.

    Returns:
      ``update(state, reference, batch) -> (state, sums)``; the reference is parameters
      or None or what `roles` takes. Gradients are of the mean loss over the whole
      batch; ``grad_norm``: their norm before clipping. Where the model has experts,
      ``aux_loss`` is their routers' load-balancing loss over the real tokens of the
      batch, whether it counts or not; ``loss`` is without.
    """

    def measure_trained(trained: Params, others: tuple, batch: Batch) -> Measured:
        return measure(*roles(trained, *others), batch)

    gradient = make_gradient(
        measure_trained, objective, num_microbatches, aux_loss_coefficient
    )
    # Where the run ends nobody wants the optimiser's statistics, and to keep the old
    # ones takes the memory of some.
    whole = optax.with_extra_args_support(optimizer)
    move = around(hold(optimizer) if on_nan == "skip" else whole).update

    def train_step(
        state: TrainState, reference: Params | None, batch: Batch
    ) -> tuple[TrainState, Sums]:
        frozen = reference if movement is None else state.moving["reference"]
        grads, sums, running = gradient(
            state.params, (frozen, state.step), batch, state.running
        )
        sums["grad_norm"] = metrics.Ratio(optax.tree.norm(grads), jnp.ones(()))
        is_made, halted = is_finite(sums), state.halted
        if on_nan == "stop":
            halted |= ~is_made
            is_made = ~halted
        updates, opt_state = move(grads, state.opt_state, state.params, is_made=is_made)
        params = optax.apply_updates(state.params, updates)
        params = choose(is_made, params, state.params)
        running = choose(is_made, running, state.running)
        step, moving = state.step + 1, state.moving
        if movement is not None:
            moving = movement.update(moving, params, step)
        if "aux_loss" in sums:  # of this step's tokens, not of those of several steps
            balance = load_balancing_loss(sums["aux_loss"])
            sums["aux_loss"] = metrics.Ratio(balance, jnp.ones(()))
        return TrainState(step, halted, params, opt_state, running, moving), sums

    return train_step


def jit_step(
    update: Update, state_shardings: Any = None, rows_sharding: Any = None
) -> TrainStep:
    """The step, compiled; the state is donated, the reference never is.

    Args:
      update: as `make_update` gives it.
      state_shardings: a sharding for each array of the state. Given, the compiler
        cannot move an array between steps and compile again for the next.
      rows_sharding: the sharding of a batch.
    """
    if state_shardings is None:
        return jax.jit(update, donate_argnums=0)
    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(state_shardings, None, rows_sharding),
        out_shardings=(state_shardings, None),
    )


def make_eval_step(
    apply: Apply,
    loss: Loss,
    *,
    token_metrics: Collection[TokenMetric] = (),
    chunk_size: int = 512,
    spread: Spread = ALONE,
) -> EvalStep:
    """Builds ``eval_step(params, reference, batch, running={})``, jitted.

    It returns the batch's sums, and each example's own figures ``[rows, slots]``.
    Statistics that a loss carries are used as they are, and not changed. Of a model
    with experts, ``aux_loss`` is that of the tokens of all batches together.
    """
    measure = make_measure(
        apply,
        loss.needs,
        token_metrics=token_metrics,
        chunk_size=chunk_size,
        spread=spread,
    )

    def eval_step(
        params: Params,
        reference: Params | None,
        batch: Batch,
        running: Running | None = None,
    ) -> tuple[Sums, Sums]:
        measured = measure(params, reference, batch)
        running = loss.initial_running() if running is None else running
        return assess(loss, measured, batch, running)

    return jax.jit(eval_step)


def assess(
    loss: Loss, measured: Measured, batch: Batch, running: Running
) -> tuple[Sums, Sums]:
    """What an evaluation step says of a batch's numbers."""
    sums = judge(loss, measured, batch, running, denominators(batch))[1]
    outcomes = loss(measured.scores, running)  # as above; the compiler sees it
    return sums, example_figures(loss, outcomes, measured.scores)


def make_kl_step(
    apply: Apply, *, chunk_size: int = 512, spread: Spread = ALONE
) -> EvalStep:
    """Builds ``kl_step(params, reference, batch)``, an evaluation step, jitted.

    On completions sampled from the policy, the mean of ``kl`` estimates the
    sequence-level KL(policy || reference), in nats.
    """

    def kl_step(
        params: Params, reference: Params | None, batch: Batch
    ) -> tuple[Sums, Sums]:
        policy, frozen = apply(params, batch), apply(reference, batch)
        kl = completion_kl(policy, frozen, batch, chunk_size=chunk_size, spread=spread)
        mean = metrics.moments(kl[..., 0], jnp.asarray(batch.live))
        return {"kl": mean}, {"kl": kl[..., 0]}

    return jax.jit(kl_step)
