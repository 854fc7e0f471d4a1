"""Losses of a chosen and a rejected completion of one prompt.

Each is a pure function of two `Scores` and returns one loss per pair; the caller
reduces. Nothing here knows a model or a batch layout.
"""

from jax.nn import log_sigmoid

from dpojax.losses.scores import Outcome, Scores


def dpo(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Outcome:
    """Direct Preference Optimization, with cDPO's label smoothing.

    ``-(1 - e) log sigmoid(h) - e log sigmoid(-h)``, where ``h`` is the difference of
    the implicit rewards ``beta * (log pi - log pi_ref)`` of chosen and rejected.
    It is ``log 2`` where policy and reference agree.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.1 in the paper.
      label_smoothing: probability ``e`` that a label is flipped, in [0, 0.5).

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    Raises:
      ValueError: if the reference's log-probabilities are missing.

    References:
      Rafailov et al., Direct Preference Optimization, 2023, arXiv:2305.18290, eq. 7.
      Mitchell, A note on DPO with noisy preferences, 2023, eq. 3 (label smoothing).
    """
    chosen_reward = beta * chosen.log_ratio
    rejected_reward = beta * rejected.log_ratio
    margin = chosen_reward - rejected_reward
    loss = -(1 - label_smoothing) * log_sigmoid(margin)
    loss -= label_smoothing * log_sigmoid(-margin)
    return Outcome(loss, chosen_reward, rejected_reward)
