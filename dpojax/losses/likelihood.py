"""Losses of one completion that is simply to be made likely.

Pure functions of `Scores`. Nothing here knows a model or a batch layout.
"""

from dpojax.losses.scores import Outcome, Scores


def sft(chosen: Scores) -> Outcome:
    """Supervised fine-tuning: the negative log-likelihood of the completion.

    ``-log pi(y|x)``, summed over tokens here and divided by the number of tokens of
    the whole batch by the caller, so that every token weighs the same.

    Args:
      chosen: the completions to imitate, each ``[*batch]``; no reference needed.

    Returns:
      The loss ``[*batch]``, in nats per completion; no rewards.

    References:
      Ouyang et al., InstructGPT, 2022, arXiv:2203.02155, section 3.5.
    """
    return Outcome(-chosen.policy)
