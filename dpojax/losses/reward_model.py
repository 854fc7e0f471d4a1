"""The loss of a reward model: `Scores.policy` are its rewards, not log-probabilities.

Nothing here knows a model or a batch layout.
"""

from jax.nn import log_sigmoid

from dpojax.losses.scores import Outcome, Scores


def bradley_terry(
    chosen: Scores,
    rejected: Scores,
    *,
    center: float = 0.0,
    margin_scale: float = 0.0,
) -> Outcome:
    """Maximum likelihood of preferences under Bradley and Terry's model.

    ``-log sigmoid(r_chosen - r_rejected - margin) + center (r_chosen + r_rejected)^2``.
    The margin is `margin_scale` times the difference of the annotators' scores.

    Args:
      chosen: rewards of the preferred completions; each ``[*batch]``.
      rejected: of the others, likewise.
      margin_scale: of the data's scores or its column ``margin``; TRL's is 1.
      center: draws the rewards' mean to 0; 0.01 by Eisenstein et al.

    Returns:
      Loss and rewards, each ``[*batch]``.

    References:
      Ouyang et al., InstructGPT, 2022, arXiv:2203.02155, eq. 1; Touvron et al.,
      Llama 2, 2023, arXiv:2307.09288 (margin); Eisenstein et al., Helping or
      Herding?, 2023, arXiv:2312.09244, eq. 2 (centring).
    """
    good, bad = chosen.policy, rejected.policy
    margin = good - bad
    if margin_scale:
        margin -= margin_scale * (chosen.rating - rejected.rating)
    return Outcome(-log_sigmoid(margin) + center * (good + bad) ** 2, (good, bad))
