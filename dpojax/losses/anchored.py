"""Losses of pairs that hold each implicit reward to a value of its own.

Where the losses of `dpojax.losses.pairs` see only the difference, these also say where
the chosen and the rejected reward should be, against likelihood displacement. ``r`` is
an implicit reward ``beta (log pi - log pi_ref)``. Nothing here knows a model.
"""

from jax.nn import log_sigmoid, sigmoid

from dpojax.losses.scores import Outcome, Scores


def nca_pair(chosen: Scores, rejected: Scores, *, beta: float = 0.01) -> Outcome:
    """Noise Contrastive Alignment of pairs: the chosen reward is kept from falling.

    ``-log sigmoid(r_chosen) - (log sigmoid(-r_chosen) + log sigmoid(-r_rejected)) / 2``

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.01 in the paper.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Chen et al., Noise Contrastive Alignment, 2024, arXiv:2402.05369.
    """
    good, bad = beta * chosen.log_ratio, beta * rejected.log_ratio
    noise = (log_sigmoid(-good) + log_sigmoid(-bad)) / 2
    return Outcome(-log_sigmoid(good) - noise, (good, bad))


def bco_pair(chosen: Scores, rejected: Scores, *, beta: float = 0.01) -> Outcome:
    """Binary classifier of chosen and rejected, without BCO's shift of rewards.

    ``-log sigmoid(r_chosen) - log sigmoid(-r_rejected)``. TRL's loss of that name, part
    of MPO; `bco` is the paper's, with its running mean.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.01 as in the paper of BCO.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Jung et al., Binary Classifier Optimization, 2024, arXiv:2404.04656.
    """
    good, bad = beta * chosen.log_ratio, beta * rejected.log_ratio
    return Outcome(-log_sigmoid(good) - log_sigmoid(-bad), (good, bad))


def sppo_hard(chosen: Scores, rejected: Scores, *, beta: float = 1e-3) -> Outcome:
    """Self-Play Preference Optimization with hard labels, a win probability of 1 or 0.

    ``(d_chosen - 1 / (2 beta))^2 + (d_rejected + 1 / (2 beta))^2``, where d is the
    log-ratio to the policy of the last iteration. `sppo` takes probabilities.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: the inverse of the paper's eta, 1e-3; the target is 500 nats then.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Wu et al., Self-Play Preference Optimization, 2024, arXiv:2405.00675, eq. 4.7.
    """
    target = 1 / (2 * beta)
    up, down = chosen.log_ratio, rejected.log_ratio
    return Outcome((up - target) ** 2 + (down + target) ** 2, (beta * up, beta * down))


def apo_zero(chosen: Scores, rejected: Scores, *, beta: float = 0.1) -> Outcome:
    """Anchored Preference Optimization for chosen completions better than the policy.

    ``1 - sigmoid(r_chosen) + sigmoid(r_rejected)``: raises the one, lowers the other.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      D'Oosterlinck et al., Anchored Preference Optimization, 2024, arXiv:2408.06266,
      eq. 7.
    """
    good, bad = beta * chosen.log_ratio, beta * rejected.log_ratio
    return Outcome(sigmoid(-good) + sigmoid(bad), (good, bad))


def apo_down(chosen: Scores, rejected: Scores, *, beta: float = 0.1) -> Outcome:
    """Anchored Preference Optimization for a policy better than the chosen ones.

    ``sigmoid(r_chosen) + 1 - sigmoid(r_chosen - r_rejected)``: lowers both, and the
    rejected one more.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      D'Oosterlinck et al., Anchored Preference Optimization, 2024, arXiv:2408.06266,
      eq. 8.
    """
    good, bad = beta * chosen.log_ratio, beta * rejected.log_ratio
    return Outcome(sigmoid(good) + sigmoid(bad - good), (good, bad))


def cal_dpo(chosen: Scores, rejected: Scores, *, beta: float = 2e-3) -> Outcome:
    """Calibrated DPO: the scale of each reward is fixed as well as their order.

    ``-log sigmoid(d_chosen - d_rejected) + ((d_chosen - 1 / (2 beta))^2 +
    (d_rejected + 1 / (2 beta))^2) / 2``, as in the authors' code, whose first term has
    no beta.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 2e-3 in the authors' code, where the
        target is 250 nats.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Xiao et al., Cal-DPO, 2024, arXiv:2412.14516, and the authors' code.
    """
    target = 1 / (2 * beta)
    up, down = chosen.log_ratio, rejected.log_ratio
    calibration = ((up - target) ** 2 + (down + target) ** 2) / 2
    return Outcome(-log_sigmoid(up - down) + calibration, (beta * up, beta * down))
