"""Losses of pairs that need no reference model.

Pure functions of two `Scores`; rewards are (scaled) log-probabilities of the policy
alone. Nothing here knows a model or a batch layout.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from dpojax.losses.pairs import smoothed_loss
from dpojax.losses.scores import Outcome, Scores


def simpo(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    label_smoothing: float = 0.0,
) -> Outcome:
    """SimPO: the log-probability per token is the reward, with a target margin.

    ``-log sigmoid(beta (log pi(chosen) / n - log pi(rejected) / m) - gamma)``. TRL's
    ``simpo_gamma`` is gamma itself, ``gamma_beta_ratio * beta`` here.

    Args:
      chosen: the preferred completions; each ``[*batch]``.
      rejected: the others, likewise.
      beta: scale of the reward; 2 to 2.5 in the paper, 10 for later models.
      gamma_beta_ratio: target margin over beta; 0.5 is the authors' starting point.
      label_smoothing: probability that a label is flipped, in [0, 0.5).

    Returns:
      Loss and rewards ``beta log pi / n``, each ``[*batch]``.

    References:
      Meng et al., SimPO, 2024, arXiv:2405.14734.
    """
    good, bad = beta * chosen.average, beta * rejected.average
    margin = good - bad - gamma_beta_ratio * beta
    return Outcome(smoothed_loss(margin, label_smoothing), (good, bad))


def cpo(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> Outcome:
    """Contrastive Preference Optimization: DPO without reference, and imitation.

    ``-log sigmoid(beta (log pi(chosen) - log pi(rejected)))`` and, as a token loss,
    ``-alpha log pi(chosen)``.

    Args:
      chosen: the preferred completions; each ``[*batch]``.
      rejected: the others, likewise.
      beta: scale of the log-probabilities, per nat; 0.1 in the paper.
      alpha: weight of the likelihood of the chosen ones, a mean over tokens; 1.
      label_smoothing: probability that a label is flipped, in [0, 0.5).

    Returns:
      Loss, rewards ``beta log pi`` and token loss, each ``[*batch]``.

    References:
      Xu et al., Contrastive Preference Optimization, 2024, arXiv:2401.08417, eq. 3.
    """
    good, bad = beta * chosen.policy, beta * rejected.policy
    loss = smoothed_loss(good - bad, label_smoothing)
    return Outcome(loss, (good, bad), token_loss=-alpha * chosen.policy)


def cpo_simpo(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    alpha: float = 1.0,
) -> Outcome:
    """CPO-SimPO: SimPO, and CPO's imitation of the chosen completions.

    Args:
      chosen: the preferred completions; each ``[*batch]``.
      rejected: the others, likewise.
      beta: scale of the reward, as in SimPO.
      gamma_beta_ratio: target margin over beta, as in SimPO.
      alpha: weight of the likelihood of the chosen ones, a mean over tokens.

    Returns:
      Loss, rewards ``beta log pi / n`` and token loss, each ``[*batch]``.

    References:
      Xu et al., the CPO_SIMPO repository, 2024; for its parts, `simpo` and `cpo`.
    """
    outcome = simpo(chosen, rejected, beta=beta, gamma_beta_ratio=gamma_beta_ratio)
    return outcome._replace(token_loss=-alpha * chosen.policy)


def alphapo(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 2.5,
    gamma_beta_ratio: float = 0.1,
    alpha: float = 0.25,
) -> Outcome:
    """AlphaPO: SimPO with a reward function whose shape alpha bends.

    The reward is ``beta (1 - p^-alpha) / alpha`` with ``p`` the geometric mean of the
    tokens' probabilities; SimPO is the limit for alpha to 0.

    Args:
      chosen: the preferred completions; each ``[*batch]``.
      rejected: the others, likewise.
      beta: scale of the reward; 2.5 in the paper's Mistral runs.
      gamma_beta_ratio: target margin over beta; 0.1 there.
      alpha: shape, not 0; 0.25 there.

    Returns:
      Loss and rewards, each ``[*batch]``.

    References:
      Gupta et al., AlphaPO, 2025, arXiv:2501.03884, and its table 3.
    """

    def reward(scores: Scores) -> Array:
        # Beyond this exponent float32 overflows; no real text is that unlikely.
        exponent = jnp.clip(-alpha * scores.average, -80.0, 80.0)
        return -beta * jnp.expm1(exponent) / alpha

    good, bad = reward(chosen), reward(rejected)
    return Outcome(-log_sigmoid(good - bad - gamma_beta_ratio * beta), (good, bad))


def orpo(chosen: Scores, rejected: Scores, *, beta: float = 0.1) -> Outcome:
    """Odds Ratio Preference Optimization: imitation, and a ratio of odds.

    ``-beta log sigmoid(log(odds(chosen) / odds(rejected)))``, where ``odds = p / (1 -
    p)`` of the geometric mean p of a completion's tokens; and, as a token loss, ``-log
    pi(chosen)``.

    Args:
      chosen: the preferred completions; each ``[*batch]``.
      rejected: the others, likewise.
      beta: the paper's lambda, weight of the odds ratio; 0.1 to 0.25 there.

    Returns:
      Loss, rewards ``beta log p`` and token loss, each ``[*batch]``.

    References:
      Hong et al., ORPO, 2024, arXiv:2403.07691, eq. 4 and 7.
    """
    good, bad = chosen.average, rejected.average
    log_odds = good - bad - (log1mexp(good) - log1mexp(bad))
    rewards = beta * good, beta * bad
    return Outcome(-beta * log_sigmoid(log_odds), rewards, token_loss=-chosen.policy)


def slic_hf(
    chosen: Scores, rejected: Scores, *, delta: float = 1.0, alpha: float = 1.0
) -> Outcome:
    """SLiC-HF: a hinge on likelihoods, and imitation.

    ``max(0, delta - log pi(chosen) + log pi(rejected)) - alpha log pi(chosen)``. The
    paper's regulariser imitates the SFT target, here the chosen completion.

    Args:
      chosen: the preferred completions; each ``[*batch]``.
      rejected: the others, likewise.
      delta: margin, nats; SimPO's grid is 0.1 to 2.
      alpha: the paper's lambda; SimPO's grid is 0.1 to 10.

    Returns:
      Loss and rewards ``log pi``, each ``[*batch]``.

    References:
      Zhao et al., SLiC-HF, 2023, arXiv:2305.10425; as in table 3
      of Meng et al., SimPO, 2024, arXiv:2405.14734.
    """
    rank = jax.nn.relu(delta - chosen.policy + rejected.policy)
    rewards = chosen.policy, rejected.policy
    return Outcome(rank - alpha * chosen.policy, rewards)


def rrhf(chosen: Scores, rejected: Scores, *, alpha: float = 1.0) -> Outcome:
    """RRHF on pairs: a hinge on log-probabilities per token, and imitation.

    ``max(0, log pi(rejected) / m - log pi(chosen) / n) - alpha log pi(chosen)``.

    Args:
      chosen: the preferred completions; each ``[*batch]``.
      rejected: the others, likewise.
      alpha: weight of the likelihood of the chosen one; 1 in the paper.

    Returns:
      Loss and rewards ``log pi / n``, each ``[*batch]``.

    References:
      Yuan et al., RRHF, 2023, arXiv:2304.05302; as in table 3 of Meng et al.,
      SimPO, 2024, arXiv:2405.14734. The authors' code averages the
      likelihood over tokens.
    """
    rewards = chosen.average, rejected.average
    rank = jax.nn.relu(rewards[1] - rewards[0])
    return Outcome(rank - alpha * chosen.policy, rewards)


def unlikelihood(chosen: Scores, rejected: Scores, *, alpha: float = 0.1) -> Outcome:
    """The DPO paper's baseline: likelihood up for the one, down for the other.

    ``-log pi(chosen) + alpha log pi(rejected)``. It has no lower bound, and the policy
    degenerates; that is what DPO's weighting prevents.

    Args:
      chosen: the preferred completions; each ``[*batch]``.
      rejected: the others, likewise.
      alpha: weight of the rejected ones; 0.05 to 1 in the paper.

    Returns:
      Loss and rewards ``log pi``, each ``[*batch]``.

    References:
      Rafailov et al., Direct Preference Optimization, 2023, arXiv:2305.18290,
      section 6 and appendix C.3.
    """
    rewards = chosen.policy, rejected.policy
    return Outcome(alpha * rejected.policy - chosen.policy, rewards)


def log1mexp(log_p: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``log(1 - p)`` from ``log p``, exact near both ends; p = 1 counts as just below.

    References:
      Maechler, Accurately Computing log(1 - exp(-|a|)), 2012, eq. 7.
    """
    log_p = jnp.minimum(log_p, -jnp.finfo(log_p.dtype).eps)
    near_one = log_p > -jnp.log(2.0)
    # Each branch sees only arguments that it can take, or its gradient would be NaN.
    by_expm1 = jnp.log(-jnp.expm1(jnp.where(near_one, log_p, -1.0)))
    by_log1p = jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, log_p)))
    return jnp.where(near_one, by_expm1, by_log1p)
