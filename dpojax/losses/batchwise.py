"""Losses of pairs that look at the whole batch: sorted rewards, a batch's own beta.

Pure functions of two `Scores`; what they compute of one pair depends on the others, so
the caller gives them the pairs of a whole optimiser step. Nothing here knows a model or
a batch layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float, Int

from dpojax.losses.pairs import smoothed_loss
from dpojax.losses.scores import Outcome, Scores


def aot(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> Outcome:
    """Alignment via Optimal Transport, paired: the policy's gaps over the reference's.

    ``x = sort(log pi(chosen) - log pi(rejected)) - sort(the same of pi_ref)``, sorted
    over the batch; ``-(1 - e) log sigmoid(beta x) - e log sigmoid(-beta x)``.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.01 in the paper.
      label_smoothing: probability ``e`` that a label is flipped, in [0, 0.5).

    Returns:
      Loss and implicit rewards, each ``[*batch]``; a pair's loss stands where the
      policy's gap of its quantile comes from.

    References:
      Melnyk et al., Distributional Preference Alignment, 2024, arXiv:2406.05882.
    """
    difference = chosen.log_ratio - rejected.log_ratio  # which asks for the reference
    policy = chosen.policy - rejected.policy
    loss = _transport(
        policy, policy - difference, chosen.present, beta, label_smoothing
    )
    return Outcome(loss, (beta * chosen.log_ratio, beta * rejected.log_ratio))


def aot_unpaired(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> Outcome:
    """Alignment via Optimal Transport, unpaired: chosen rewards exceed rejected ones.

    ``x = sort(d_chosen) - sort(d_rejected)``, sorted over the batch; the loss as in
    `aot`.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.01 in the paper.
      label_smoothing: probability ``e`` that a label is flipped, in [0, 0.5).

    Returns:
      Loss and implicit rewards, each ``[*batch]``; a loss stands where the chosen
      reward of its quantile comes from.

    References:
      Melnyk et al., Distributional Preference Alignment, 2024, arXiv:2406.05882.
    """
    up, down = chosen.log_ratio, rejected.log_ratio
    loss = _transport(up, down, chosen.present, beta, label_smoothing)
    return Outcome(loss, (beta * up, beta * down))


class RunningMargin(NamedTuple):
    """Moving averages of beta-DPO over steps, of the margin without beta."""

    mean: Float[Array, ""]
    deviation: Float[Array, ""]  # the standard deviation within a batch
    step: Int[Array, ""]  # seeds the choice of pairs


def initial_margin() -> RunningMargin:
    """Before anything was seen."""
    return RunningMargin(jnp.zeros(()), jnp.ones(()), jnp.zeros((), jnp.int32))


def update_margin(
    running: RunningMargin, chosen: Scores, rejected: Scores
) -> RunningMargin:
    """Takes a batch into the moving averages, with decay 0.9.

    Args:
      running: the averages before.
      chosen: the batch, each ``[*batch]``.
      rejected: likewise.
    """
    present = chosen.present
    margin = jax.lax.stop_gradient(chosen.log_ratio - rejected.log_ratio)
    count = jnp.maximum(jnp.sum(present), 1)
    mean = jnp.sum(jnp.where(present, margin, 0.0)) / count
    square = jnp.sum(jnp.where(present, (margin - mean) ** 2, 0.0))
    deviation = jnp.sqrt(square / jnp.maximum(count - 1, 1))
    return RunningMargin(
        0.9 * running.mean + 0.1 * mean,
        0.9 * running.deviation + 0.1 * deviation,
        running.step + 1,
    )


def beta_dpo(
    chosen: Scores,
    rejected: Scores,
    running: RunningMargin,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    rho: float = 0.2,
) -> Outcome:
    """DPO with a beta of each batch's own, and without its outlying pairs.

    Of the batch a share of ``1 - rho`` is drawn without replacement, with probabilities
    in proportion to the normal density of the margin ``D`` (without beta) around its
    moving average M; with ``beta_b = max(beta (1 + alpha (mean(D) - M)), 1e-3)`` over
    those drawn, their loss is ``-log sigmoid(beta_b D)``.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      running: moving averages of the margin, by `update_margin`.
      beta: beta of an average batch, per nat; 0.1 in the paper.
      alpha: how much beta follows the margin; 0.6 in the paper.
      rho: share of the batch that is left out, in [0, 1); 0.2 in the paper.

    Returns:
      Loss and implicit rewards, each ``[*batch]``; the mean of the loss is that over
      the pairs drawn. ``beta`` is logged.

    References:
      Wu et al., beta-DPO, 2024, arXiv:2407.08639, and the authors' code.
    """
    log_ratios = chosen.log_ratio, rejected.log_ratio
    difference = log_ratios[0] - log_ratios[1]
    margin = jax.lax.stop_gradient(difference)
    num_pairs = jnp.sum(chosen.present)
    count = num_kept(num_pairs, rho)
    kept = _draw(margin, running, chosen.present, count)
    mean = jnp.sum(jnp.where(kept, margin, 0.0)) / count
    batch_beta = jnp.maximum(beta * (1 + alpha * (mean - running.mean)), 1e-3)
    loss = jnp.where(kept, -log_sigmoid(batch_beta * difference), 0.0)
    # As the authors log them: with one beta, curves compare from step to step.
    rewards = beta * log_ratios[0], beta * log_ratios[1]
    return Outcome(loss * num_pairs / count, rewards, logged={"beta": batch_beta})


def num_kept(num_pairs: Int[Array, ""], rho: float) -> Float[Array, ""]:
    """``floor((1 - rho) num_pairs)``, and at least 1."""
    # (1 - 0.9) * 10 is 0.9999999999999998 where Python reckons.
    return jnp.maximum(jnp.floor((1 - rho) * num_pairs + 1e-3), 1)


def _draw(
    margin: Float[Array, "*batch"],
    running: RunningMargin,
    present: Bool[Array, "*batch"],
    count: Float[Array, ""],
) -> Bool[Array, "*batch"]:
    """Draws pairs by the density of their margin, by the Gumbel top-k trick."""
    deviation = jnp.maximum(running.deviation, 1e-6)
    log_density = -0.5 * ((margin - running.mean) / deviation) ** 2
    key = jax.random.fold_in(jax.random.key(0), running.step)
    noisy = log_density + jax.random.gumbel(key, margin.shape, margin.dtype)
    # A rank, not a threshold: exactly so many pairs, whatever ties.
    order = jnp.argsort(-jnp.where(present, noisy, -jnp.inf).ravel())
    rank = jnp.argsort(order).reshape(margin.shape)
    return (rank < count) & present


def _transport(
    first: Float[Array, "*batch"],
    second: Float[Array, "*batch"],
    present: Bool[Array, "*batch"],
    beta: float,
    label_smoothing: float,
) -> Float[Array, "*batch"]:
    """The loss of quantiles of `first` against those of `second`, where `first` is."""
    order = _order(first, present)
    gap = first.ravel()[order] - second.ravel()[_order(second, present)]
    loss = smoothed_loss(beta * gap, label_smoothing)
    return loss[jnp.argsort(order)].reshape(first.shape)


def _order(
    values: Float[Array, "*batch"], present: Bool[Array, "*batch"]
) -> Int[Array, " pairs"]:
    """Ascending, what is absent last."""
    return jnp.argsort(jnp.where(present, values, jnp.inf).ravel())
