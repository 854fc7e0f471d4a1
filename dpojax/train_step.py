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
from dpojax.log_probs import completion_kl, completion_log_probs
from dpojax.losses.scores import Scores
from dpojax.losses.table import Objective
from dpojax.metrics import Sums

Params = Any
# (params, batch) -> hidden states [rows, length, width], output [vocabulary, width]
Apply = Callable[[Params, Batch], tuple[Array, Array]]
TrainStep = Callable[["TrainState", Params | None, Batch], tuple["TrainState", Sums]]
EvalStep = Callable[[Params, Params | None, Batch], Sums]


class TrainState(NamedTuple):
    """What training changes, and a checkpoint keeps."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
    apply: Apply,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    chunk_size: int = 512,
    num_shards: int = 1,
    state_shardings: Any = None,
    rows_sharding: Any = None,
) -> TrainStep:
    """Builds the jitted step.

    Args:
      apply: the model: parameters and batch to hidden states and output matrix.
      objective: the loss and what it needs.
      optimizer: its update ends in the change of the parameters.
      num_microbatches: parts into which the rows are split, one after another.
      chunk_size: positions of each shard whose logits exist at one time.
      num_shards: ways in which the rows are divided over devices.
      state_shardings: a sharding for each array of the state. Given, the compiler
        cannot move an array between steps and compile again for the next.
      rows_sharding: the sharding of a batch.

    Returns:
      ``train_step(state, reference, batch) -> (state, sums)``. The state is donated;
      the reference, parameters or None, never is. Gradients are of the mean loss over
      the whole batch; ``grad_norm`` is their norm before clipping.
    """
    score_and_sum = _make_score_and_sum(apply, objective, chunk_size, num_shards)
    gradient = jax.value_and_grad(score_and_sum, has_aux=True)

    def train_step(
        state: TrainState, reference: Params | None, batch: Batch
    ) -> tuple[TrainState, Sums]:
        def accumulate(total: tuple, part: Batch) -> tuple[tuple, None]:
            (_, sums), grads = gradient(state.params, reference, part)
            return jax.tree.map(jnp.add, total, (grads, sums)), None

        if num_microbatches == 1:
            (_, sums), grads = gradient(state.params, reference, batch)
        else:
            parts = _split_rows(batch, num_microbatches)
            shapes = jax.eval_shape(
                gradient, state.params, reference, jax.tree.map(lambda x: x[0], parts)
            )
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), (shapes[1], shapes[0][1])
            )
            (grads, sums), _ = jax.lax.scan(accumulate, zeros, parts)
        count = jnp.maximum(sums["loss"].count, 1)
        grads = jax.tree.map(lambda total: total / count, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        one = jnp.ones(())
        sums["grad_norm"] = metrics.Ratio(optax.tree.norm(grads), one)
        return TrainState(state.step + 1, params, opt_state), sums

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
    objective: Objective,
    *,
    chunk_size: int = 512,
    num_shards: int = 1,
) -> EvalStep:
    """Builds ``eval_step(params, reference, batch) -> sums``, jitted."""
    score_and_sum = _make_score_and_sum(apply, objective, chunk_size, num_shards)
    return jax.jit(lambda *arguments: score_and_sum(*arguments)[1])


def make_kl_step(
    apply: Apply, *, chunk_size: int = 512, num_shards: int = 1
) -> EvalStep:
    """Builds ``kl_step(params, reference, batch) -> sums``, jitted.

    On completions sampled from the policy, the mean of ``kl`` estimates the
    sequence-level KL(policy || reference), in nats.
    """

    def kl_step(params: Params, reference: Params | None, batch: Batch) -> Sums:
        policy, frozen = apply(params, batch), apply(reference, batch)
        kl = completion_kl(
            policy, frozen, batch, chunk_size=chunk_size, num_shards=num_shards
        )
        return {"kl": metrics.moments(kl[..., 0], jnp.asarray(batch.live))}

    return jax.jit(kl_step)


def _make_score_and_sum(
    apply: Apply, objective: Objective, chunk_size: int, num_shards: int
) -> Callable[[Params, Params | None, Batch], tuple[Array, Sums]]:
    """The sum of the loss over a batch, and every metric's sums."""

    def log_probs(params: Params, batch: Batch) -> Array:
        hidden, output = apply(params, batch)
        return completion_log_probs(
            hidden, output, batch, chunk_size=chunk_size, num_shards=num_shards
        )

    def score_and_sum(
        params: Params, reference: Params | None, batch: Batch
    ) -> tuple[Array, Sums]:
        policy = log_probs(params, batch)
        # The same function of other parameters: at step 0 the log-ratio is exactly 0.
        frozen = None
        if objective.needs_reference:
            frozen = jax.lax.stop_gradient(log_probs(reference, batch))
        scores = _as_scores(policy, frozen, batch, objective.num_completions)
        outcome = objective.loss(*scores)
        live = jnp.asarray(batch.live)
        total = jnp.sum(jnp.where(live, outcome.loss, 0.0))
        return total, _sums(objective, outcome, scores, live)

    return score_and_sum


def _as_scores(
    policy: Float[Array, "rows slots completions"],
    reference: Float[Array, "rows slots completions"] | None,
    batch: Batch,
    num_completions: int,
) -> list[Scores]:
    # An empty slot gets length 1: what is masked afterwards must still be finite.
    length = jnp.maximum(jnp.asarray(batch.completion_length), 1)
    return [
        Scores(
            policy[..., k],
            None if reference is None else reference[..., k],
            length[..., k],
        )
        for k in range(num_completions)
    ]


def _sums(
    objective: Objective, outcome: Any, scores: list[Scores], live: Array
) -> Sums:
    chosen = scores[0]
    loss = metrics.moments(outcome.loss, live)
    if objective.averaged_over == "tokens":
        lengths = jnp.stack([score.length for score in scores])
        loss = metrics.Ratio(loss.total, jnp.sum(jnp.where(live, lengths, 0)))
    sums: Sums = {"loss": loss}
    for name, score in zip(("chosen", "rejected"), scores, strict=False):
        sums |= metrics.completion_sums(name, score.policy, score.length, live)
    if outcome.chosen_reward is not None:
        rejected = scores[1]
        sums |= metrics.reward_sums(
            outcome.chosen_reward,
            outcome.rejected_reward,
            chosen.length - rejected.length,
            live,
        )
    if objective.needs_reference:
        sums |= metrics.log_ratio_sums(chosen.log_ratio, scores[1].log_ratio, live)
    return sums


def _split_rows(batch: Batch, num_parts: int) -> Batch:
    """Rows ``[rows, ...]`` to ``[parts, rows / parts, ...]``.

    Part m takes rows m, m + parts, ...: each device's block of rows gives every part
    the same share, so no row moves between devices.
    """

    def split(array: Array) -> Array:
        array = jnp.asarray(array)
        return array.reshape(-1, num_parts, *array.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)
