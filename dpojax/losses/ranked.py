"""Losses of K completions of one prompt that were ranked or scored.

Pure functions of one `Scores` whose last axis is the completions; lists may be ragged
(length 0: no completion) and scores may tie. ``r`` are the implicit rewards ``beta (log
pi - log pi_ref)``. Nothing here knows a model or a batch layout.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, log_softmax, logsumexp
from jaxtyping import Array, Float

from dpojax.losses.scores import Outcome, Scores

Rewards = Float[Array, "*batch completions"]


def plackett_luce(candidates: Scores, *, beta: float = 0.1) -> Outcome:
    """DPO for rankings: the likelihood of the ranking under Plackett and Luce.

    ``-sum_k log(exp r_k / sum_{j not better than k} exp r_j)``, each completion against
    itself and all that scored lower. Completions that tie are not compared with each
    other. For two completions it is DPO.

    Args:
      candidates: with reference and score; each ``[*batch, completions]``.
      beta: strength of the KL constraint, per nat.

    Returns:
      Loss ``[*batch]``, summed over completions, and implicit rewards.

    References:
      Rafailov et al., Direct Preference Optimization, 2023, arXiv:2305.18290,
      appendix A.3.
    """
    reward = beta * candidates.log_ratio
    score, present = candidates.rating, candidates.present
    below = (score[..., None, :] < score[..., :, None]) & present[..., None, :]
    compared = below | jnp.eye(score.shape[-1], dtype=bool)
    rivals = jnp.where(compared, reward[..., None, :], -jnp.inf)
    loss = logsumexp(rivals, axis=-1) - reward
    return Outcome(_sum(loss, present), (reward,))


def infonca(candidates: Scores, *, beta: float = 0.01, alpha: float = 0.01) -> Outcome:
    """InfoNCA: cross-entropy from the scores' softmax to the rewards'.

    ``-sum_k softmax(score / alpha)_k log softmax(r)_k``. For two completions and hard
    labels it is DPO.

    Args:
      candidates: with reference and score; each ``[*batch, completions]``.
      beta: strength of the KL constraint, per nat; 0.01 in the paper.
      alpha: temperature of the scores; 0.01 in the paper.

    Returns:
      Loss ``[*batch]`` and implicit rewards.

    References:
      Chen et al., Noise Contrastive Alignment, 2024, arXiv:2402.05369.
    """
    reward, target = beta * candidates.log_ratio, _target(candidates, alpha)
    loss = -target * log_softmax(_masked(reward, candidates))
    return Outcome(_sum(loss, candidates.present), (reward,))


def nca(candidates: Scores, *, beta: float = 0.01, alpha: float = 0.01) -> Outcome:
    """NCA: each completion against noise; the best one's likelihood is kept up.

    ``-sum_k (softmax(score / alpha)_k log sigmoid(r_k) + log sigmoid(-r_k) / K)``.

    Args:
      candidates: with reference and score; each ``[*batch, completions]``.
      beta: strength of the KL constraint, per nat; 0.01 in the paper.
      alpha: temperature of the scores; 0.01 in the paper.

    Returns:
      Loss ``[*batch]`` and implicit rewards.

    References:
      Chen et al., Noise Contrastive Alignment, 2024, arXiv:2402.05369.
    """
    reward, target = beta * candidates.log_ratio, _target(candidates, alpha)
    present = candidates.present
    count = jnp.maximum(jnp.sum(present, axis=-1, keepdims=True), 1)
    loss = -target * log_sigmoid(reward) - log_sigmoid(-reward) / count
    return Outcome(_sum(loss, present), (reward,))


def exo(candidates: Scores, *, beta: float = 0.1, alpha: float = 0.1) -> Outcome:
    """EXO: reverse KL from the rewards' softmax to the scores'.

    ``sum_k p_k (log p_k - log q_k)`` with ``p = softmax(r)`` and ``q = softmax(score /
    alpha)``.

    Args:
      candidates: with reference and score; each ``[*batch, completions]``.
      beta: the paper's beta_pi, per nat; 0.1 there.
      alpha: its beta_r, temperature of the scores; 0.1 there.

    Returns:
      Loss ``[*batch]`` and implicit rewards.

    References:
      Ji et al., Towards Efficient Exact Optimization (EXO), 2024, arXiv:2402.00856.
    """
    reward = beta * candidates.log_ratio
    log_p = log_softmax(_masked(reward, candidates))
    log_q = log_softmax(_masked(candidates.rating / alpha, candidates))
    loss = jnp.exp(log_p) * (log_p - log_q)
    return Outcome(_sum(loss, candidates.present), (reward,))


def sppo(candidates: Scores, *, beta: float = 1e-3) -> Outcome:
    """Self-Play Preference Optimization: log-ratios regress on win probabilities.

    ``sum_k (d_k - (P_k - 1/2) / beta)^2``, where P is the probability, in [0, 1], that
    the completion beats one of the policy of the last iteration. The authors' code
    halves the sum.

    Args:
      candidates: with reference, and P as score; each ``[*batch, completions]``.
      beta: the inverse of the paper's eta, 1e-3.

    Returns:
      Loss ``[*batch]`` and implicit rewards ``beta d``.

    References:
      Wu et al., Self-Play Preference Optimization, 2024, arXiv:2405.00675, eq. 4.7.
    """
    log_ratio = candidates.log_ratio
    loss = (log_ratio - (candidates.rating - 0.5) / beta) ** 2
    return Outcome(_sum(loss, candidates.present), (beta * log_ratio,))


def _target(candidates: Scores, alpha: float) -> Rewards:
    return jax.nn.softmax(_masked(candidates.rating / alpha, candidates))


def _masked(values: Rewards, candidates: Scores) -> Rewards:
    """Absent completions get no share of a softmax; finite, so that gradients are."""
    lowest = jnp.finfo(values.dtype).min / 2
    return jnp.where(candidates.present, values, lowest)


def _sum(loss: Rewards, present: Array) -> Float[Array, "*batch"]:
    return jnp.sum(jnp.where(present, loss, 0.0), axis=-1)
