"""Losses of one completion that is to be made likely, or unlikely.

Pure functions of `Scores`. Nothing here knows a model or a batch layout.
"""

import jax.numpy as jnp
from jax.nn import log_sigmoid

from dpojax.losses.scores import Outcome, Scores


def sft(completion: Scores) -> Outcome:
    """Supervised fine-tuning: the negative log-likelihood of the completion.

    ``-log pi(y|x)``, as a token loss: the caller divides by the tokens of the whole
    batch, so that every token weighs the same.

    Args:
      completion: the completions to imitate, each ``[*batch]``; no reference needed.

    Returns:
      The token loss ``[*batch]``, in nats per completion; no rewards.

    References:
      Ouyang et al., InstructGPT, 2022, arXiv:2203.02155, section 3.5.
    """
    return Outcome(jnp.zeros_like(completion.policy), token_loss=-completion.policy)


def npo(completion: Scores, *, beta: float = 0.1) -> Outcome:
    """Negative Preference Optimization: DPO with a rejected completion only.

    ``-(2 / beta) log sigmoid(-beta log(pi / pi_ref))``; for beta to 0 gradient ascent
    on the likelihood. For unlearning: the completions are those to forget.

    Args:
      completion: the completions to forget, with reference; each ``[*batch]``.
      beta: strength of the KL constraint, per nat; 0.1 in the paper.

    Returns:
      Loss and implicit reward, each ``[*batch]``.

    References:
      Zhang et al., Negative Preference Optimization, 2024, arXiv:2404.05868.
    """
    reward = beta * completion.log_ratio
    return Outcome(-2 / beta * log_sigmoid(-reward), (reward,))


def simnpo(completion: Scores, *, beta: float = 2.5, gamma: float = 0.0) -> Outcome:
    """SimNPO: NPO without a reference, its reward averaged over tokens.

    ``-(2 / beta) log sigmoid(-(beta / n) log pi(y|x) - gamma)``.

    Args:
      completion: the completions to forget; each ``[*batch]``.
      beta: scale of the averaged log-probability; 2.5 to 4.5 in the paper's TOFU runs.
      gamma: margin; 0 in the paper's runs. The authors' code has beta times it.

    Returns:
      Loss and reward ``beta / n log pi``, each ``[*batch]``.

    References:
      Fan et al., Simplicity Prevails, 2024, arXiv:2410.07163.
    """
    reward = beta * completion.average
    return Outcome(-2 / beta * log_sigmoid(-reward - gamma), (reward,))
