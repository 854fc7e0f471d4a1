"""Losses of single completions that were judged desirable or undesirable.

Pure functions of `Scores` whose score is the label, 1 or 0. ``r`` is the implicit
reward ``beta (log pi - log pi_ref)``. Nothing here knows a model or a batch layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from dpojax.losses.scores import Outcome, Scores


def kto(
    completion: Scores,
    mismatched: Scores,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Outcome:
    """Kahneman-Tversky Optimization: the value of a completion against a reference.

    ``w_D (1 - sigmoid(r - beta z0))`` where desirable, ``w_U (1 - sigmoid(beta z0 -
    r))`` where not. ``z0`` estimates KL(pi || pi_ref): the mean log-ratio of
    completions that belong to other prompts, over the whole batch, at least 0, without
    gradient.

    Args:
      completion: what was judged, with reference and label; each ``[*batch]``.
      mismatched: another prompt's completion after this one's prompt, likewise.
      beta: strength of the KL constraint, per nat; 0.1 in the paper.
      desirable_weight: the paper's lambda_D.
      undesirable_weight: lambda_U. By the paper's eq. 8, ``lambda_D n_D / (lambda_U
        n_U)`` should be in [1, 3/2], n the numbers of desirable and undesirable ones.

    Returns:
      Loss and implicit reward, each ``[*batch]``; ``kl``, which is z0, is logged.

    References:
      Ethayarajh et al., KTO, 2024, arXiv:2402.01306, eq. 7.
    """
    reward = beta * completion.log_ratio
    log_ratio = jax.lax.stop_gradient(mismatched.log_ratio)
    z0 = jnp.maximum(_mean(log_ratio, mismatched.present), 0.0)
    good = desirable_weight * sigmoid(beta * z0 - reward)
    bad = undesirable_weight * sigmoid(reward - beta * z0)
    return Outcome(_by_label(completion, good, bad), (reward,), logged={"kl": z0})


def apo_zero_unpaired(completion: Scores, *, beta: float = 0.1) -> Outcome:
    """APO-zero of single completions: KTO with z0 = 0.

    ``1 - sigmoid(r)`` where desirable, ``sigmoid(r)`` where not.

    Args:
      completion: what was judged, with reference and label; each ``[*batch]``.
      beta: strength of the KL constraint, per nat.

    Returns:
      Loss and implicit reward, each ``[*batch]``.

    References:
      D'Oosterlinck et al., Anchored Preference Optimization, 2024, arXiv:2408.06266,
      eq. 7.
    """
    reward = beta * completion.log_ratio
    return Outcome(_by_label(completion, sigmoid(-reward), sigmoid(reward)), (reward,))


class RunningMean(NamedTuple):
    """The mean of all rewards seen so far, each counted once."""

    mean: Float[Array, ""]
    count: Float[Array, ""]


def initial_mean() -> RunningMean:
    """Before anything was seen."""
    return RunningMean(jnp.zeros(()), jnp.zeros(()))


def update_mean(
    running: RunningMean, completion: Scores, *, beta: float = 0.01
) -> RunningMean:
    """Takes a batch's rewards into the mean.

    Args:
      running: the mean before.
      completion: the batch, each ``[*batch]``.
      beta: as in `bco`.
    """
    present = completion.present
    reward = beta * jax.lax.stop_gradient(completion.log_ratio)
    count = running.count + jnp.sum(present)
    surplus = jnp.sum(jnp.where(present, reward - running.mean, 0.0))
    return RunningMean(running.mean + surplus / jnp.maximum(count, 1), count)


def bco(completion: Scores, running: RunningMean, *, beta: float = 0.01) -> Outcome:
    """Binary Classifier Optimization: a classifier of rewards around their mean.

    ``-log sigmoid(r - delta)`` where desirable, ``-log sigmoid(delta - r)`` where not;
    delta is the running mean of all rewards, this batch's included. The paper's density
    ratio of prompts is a weight of the data (a column ``weight``).

    Args:
      completion: what was judged, with reference and label; each ``[*batch]``.
      running: the mean of rewards, by `update_mean`.
      beta: strength of the KL constraint, per nat; 0.01 in the paper.

    Returns:
      Loss and implicit reward, each ``[*batch]``; ``delta`` is logged.

    References:
      Jung et al., Binary Classifier Optimization, 2024, arXiv:2404.04656.
    """
    reward = beta * completion.log_ratio
    shifted = reward - running.mean
    loss = _by_label(completion, -log_sigmoid(shifted), -log_sigmoid(-shifted))
    return Outcome(loss, (reward,), logged={"delta": running.mean})


def _by_label(completion: Scores, good: Array, bad: Array) -> Array:
    return jnp.where(completion.rating > 0.5, good, bad)


def _mean(values: Array, where: Array) -> Array:
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where), 1)
