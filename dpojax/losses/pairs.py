"""Losses of the difference between the implicit rewards of a chosen and a rejected one.

Each is a pure function of two `Scores` and returns one loss per pair; the caller
reduces. Throughout, ``d`` is a completion's log-ratio ``log pi - log pi_ref``, ``n``
its length, and ``h = beta (d_chosen - d_rejected)`` the margin. Since only the
difference counts, the partition function cancels, and both rewards may fall. Nothing
here knows a model or a batch layout.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from dpojax.losses.scores import Outcome, Scores


def dpo(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Outcome:
    """Direct Preference Optimization, with cDPO's label smoothing.

    ``-(1 - e) log sigmoid(h) - e log sigmoid(-h)``. It is ``log 2`` where policy and
    reference agree.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.1 in the paper.
      label_smoothing: probability ``e`` that a label is flipped, in [0, 0.5).

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    Raises:
      ValueError: if the reference's log-probabilities are missing; so do all below.

    References:
      Rafailov et al., Direct Preference Optimization, 2023, arXiv:2305.18290, eq. 7.
      Mitchell, A note on DPO with noisy preferences, 2023, eq. 3 (label smoothing).
    """
    rewards = _rewards(chosen, rejected, beta)
    return Outcome(smoothed_loss(rewards[0] - rewards[1], label_smoothing), rewards)


def step_dpo(chosen: Scores, rejected: Scores, *, beta: float = 0.4) -> Outcome:
    """Step-DPO: DPO on one step of reasoning after the correct steps before it.

    The data differs, not the formula: the prompt is the question and the steps that
    were right, the completions are the next step, right and wrong.

    Args:
      chosen: the right steps, with reference; each ``[*batch]``.
      rejected: the wrong ones, likewise.
      beta: strength of the KL constraint, per nat; 0.4 for the paper's 72B model.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Lai et al., Step-DPO, 2024, arXiv:2406.18629.
    """
    return dpo(chosen, rejected, beta=beta)


def robust_dpo(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Outcome:
    """Robust DPO: an unbiased estimate of DPO's loss under flipped labels.

    ``(-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e)``. Its expectation over
    labels that are flipped with probability e is DPO's loss on the clean ones. For
    e > 0 it has no lower bound.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat.
      label_smoothing: probability ``e`` that a label is flipped, in [0, 0.5).

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Chowdhury et al., Provably Robust DPO, 2024, arXiv:2403.00409.
    """
    rewards = _rewards(chosen, rejected, beta)
    margin = rewards[0] - rewards[1]
    right = (1 - label_smoothing) * log_sigmoid(margin)
    flipped = label_smoothing * log_sigmoid(-margin)
    return Outcome((flipped - right) / (1 - 2 * label_smoothing), rewards)


def ipo(
    chosen: Scores, rejected: Scores, *, beta: float = 0.1, average: bool = True
) -> Outcome:
    """Identity Preference Optimization: the margin is drawn to a finite target.

    ``(d_chosen / n_chosen - d_rejected / n_rejected - 1 / (2 beta))^2``. The authors
    confirmed to Hugging Face that log-ratios are averaged over tokens; the code of the
    DPO paper sums them.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: the paper's tau, strength of the KL constraint; 0.1 in its section 5.
      average: divide each log-ratio by its length.

    Returns:
      Loss and implicit rewards (of sums), each ``[*batch]``.

    References:
      Azar et al., A General Theoretical Paradigm, 2023, arXiv:2310.12036, eq. 17.
    """
    if average:
        difference = chosen.average_log_ratio - rejected.average_log_ratio
    else:
        difference = chosen.log_ratio - rejected.log_ratio
    loss = (difference - 1 / (2 * beta)) ** 2
    return Outcome(loss, _rewards(chosen, rejected, beta))


def hinge(chosen: Scores, rejected: Scores, *, beta: float = 0.05) -> Outcome:
    """Hinge loss on the margin: RSO's, and SLiC's with normalised likelihoods.

    ``max(0, 1 - h)``.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: the paper's gamma, per nat; 0.05 there.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Liu et al., Statistical Rejection Sampling (RSO), 2023, arXiv:2309.06657.
    """
    rewards = _rewards(chosen, rejected, beta)
    return Outcome(jax.nn.relu(1 - (rewards[0] - rewards[1])), rewards)


def exo_pair(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Outcome:
    """EXO on pairs: reverse KL from the policy's preference to the smoothed label.

    ``q (log q - log(1 - e)) + (1 - q)(log(1 - q) - log e)`` with ``q = sigmoid(h)``;
    DPO minimises the forward KL.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.1 in the paper.
      label_smoothing: ``e`` in (0, 0.5); 1e-3 in the paper.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Ji et al., Towards Efficient Exact Optimization (EXO), 2024, arXiv:2402.00856,
      eq. 16.
    """
    rewards = _rewards(chosen, rejected, beta)
    margin = rewards[0] - rewards[1]
    target = jnp.log(jnp.asarray([1 - label_smoothing, label_smoothing], margin.dtype))
    right = sigmoid(margin) * (log_sigmoid(margin) - target[0])
    wrong = sigmoid(-margin) * (log_sigmoid(-margin) - target[1])
    return Outcome(right + wrong, rewards)


def discopop(
    chosen: Scores, rejected: Scores, *, beta: float = 0.05, tau: float = 0.05
) -> Outcome:
    """DiscoPOP: the log-ratio modulated loss that a language model discovered.

    ``(1 - m) (-log sigmoid(h)) + m exp(-h)`` with ``m = sigmoid(h / tau)``. Not convex:
    it has a local optimum at negative margins.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.05 in the paper.
      tau: temperature of the modulation; 0.05 in the paper.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Lu et al., Discovering Preference Optimization Algorithms, 2024,
      arXiv:2406.08414, eq. 5.
    """
    rewards = _rewards(chosen, rejected, beta)
    margin = rewards[0] - rewards[1]
    # m exp(-h) in one exponent: apart, one factor may be 0 and the other infinite.
    exponential = jnp.exp(log_sigmoid(margin / tau) - margin)
    return Outcome(-sigmoid(-margin / tau) * log_sigmoid(margin) + exponential, rewards)


def dpo_norm(chosen: Scores, rejected: Scores, *, beta: float = 5.0) -> Outcome:
    """Length-normalised DPO, as Tulu 3 and OLMo 2 use it.

    ``-log sigmoid(beta (d_chosen / n_chosen - d_rejected / n_rejected))``.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: scale of the averaged log-ratios; 5 in Tulu 3.

    Returns:
      Loss and implicit rewards (of sums, as TRL's sigmoid_norm), each ``[*batch]``.

    References:
      Lambert et al., Tulu 3, 2024, arXiv:2411.15124.
    """
    margin = beta * (chosen.average_log_ratio - rejected.average_log_ratio)
    return Outcome(-log_sigmoid(margin), _rewards(chosen, rejected, beta))


def r_dpo(
    chosen: Scores, rejected: Scores, *, beta: float = 0.1, alpha: float = 0.05
) -> Outcome:
    """Length-regularised DPO: length explains part of the preference.

    ``-log sigmoid(h + alpha (n_chosen - n_rejected))``: a longer chosen completion
    needs less of a margin, so length is learned less.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat.
      alpha: reward per token; 0.05 is the least of SimPO's grid for this loss, and the
        paper tries 0.005 and 0.01 for HH, 0.2 and 0.5 for TL;DR.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Park et al., Disentangling Length from Quality, 2024, arXiv:2403.19159.
    """
    rewards = _rewards(chosen, rejected, beta)
    explained = alpha * (chosen.length - rejected.length)
    return Outcome(-log_sigmoid(rewards[0] - rewards[1] + explained), rewards)


def odpo(
    chosen: Scores, rejected: Scores, *, beta: float = 0.1, alpha: float = 1.0
) -> Outcome:
    """DPO with an offset: the margin must exceed how much better the chosen one is.

    ``-log sigmoid(h - alpha log(score_chosen - score_rejected))``. A column ``margin``
    of the data stands for the difference of the scores.

    Args:
      chosen: the preferred completions, with reference and score; each ``[*batch]``.
      rejected: the others, likewise; their scores must be lower.
      beta: strength of the KL constraint, per nat.
      alpha: scale of the offset; 1 in the paper, 0.5 for IMDb.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Amini et al., Direct Preference Optimization with an Offset, 2024,
      arXiv:2402.10571.
    """
    rewards = _rewards(chosen, rejected, beta)
    difference = chosen.rating - rejected.rating
    # Where there is no example both scores are 0; what comes of it counts nowhere.
    offset = alpha * jnp.log(jnp.where(chosen.present, difference, 1.0))
    return Outcome(-log_sigmoid(rewards[0] - rewards[1] - offset), rewards)


def dpop(
    chosen: Scores, rejected: Scores, *, beta: float = 0.3, penalty: float = 50.0
) -> Outcome:
    """DPO-Positive: the chosen completion may not become less likely.

    ``-log sigmoid(beta (d_chosen - d_rejected - penalty max(0, -d_chosen)))``.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.3 in the paper.
      penalty: the paper's lambda; 50 there, of 5, 50 and 500.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Pal et al., Smaug: Fixing Failure Modes with DPO-Positive, 2024,
      arXiv:2402.13228.
    """
    rewards = _rewards(chosen, rejected, beta)
    fallen = beta * penalty * jax.nn.relu(-chosen.log_ratio)
    return Outcome(-log_sigmoid(rewards[0] - rewards[1] - fallen), rewards)


def smoothed_loss(
    margin: Float[Array, "*batch"], label_smoothing: float
) -> Float[Array, "*batch"]:
    """``-(1 - e) log sigmoid(margin) - e log sigmoid(-margin)``."""
    loss = -(1 - label_smoothing) * log_sigmoid(margin)
    # Only where it counts: 0 times an infinity would be no number.
    return loss - label_smoothing * log_sigmoid(-margin) if label_smoothing else loss


def _rewards(chosen: Scores, rejected: Scores, beta: float) -> tuple[Array, Array]:
    return beta * chosen.log_ratio, beta * rejected.log_ratio
