"""Losses of pairs that see the KL of every token to the reference.

``K`` is the sum over a completion's tokens of KL(reference || policy), over the whole
vocabulary. Nothing here knows a model or a batch layout.
"""

import jax
from jax.nn import log_sigmoid
from jaxtyping import Array

from dpojax.losses.scores import Outcome, Scores, given


def tdpo1(chosen: Scores, rejected: Scores, *, beta: float = 0.1) -> Outcome:
    """Token-level DPO: the margin less the difference of the token-wise KLs.

    ``-log sigmoid(beta (d_chosen - d_rejected - (K_rejected - K_chosen)))``, where K is
    the sum over a completion's tokens of KL(reference || policy), all of which carries
    a gradient.

    Args:
      chosen: the preferred completions, with reference and token_kl; ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.1 in the paper.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Zeng et al., Token-level DPO, 2024, arXiv:2404.11999.
    """
    rewards = beta * chosen.log_ratio, beta * rejected.log_ratio
    difference = beta * (_token_kl(rejected) - _token_kl(chosen))
    return Outcome(-log_sigmoid(rewards[0] - rewards[1] - difference), rewards)


def tdpo2(
    chosen: Scores, rejected: Scores, *, beta: float = 0.1, alpha: float = 0.5
) -> Outcome:
    """Token-level DPO, second form: the chosen one's KL is a constant.

    ``-log sigmoid(beta (d_chosen - d_rejected - alpha (K_rejected - sg(K_chosen))))``.

    Args:
      chosen: the preferred completions, with reference and token_kl; ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat; 0.1 in the paper.
      alpha: weight of the KL difference; 0.5 in the paper.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Zeng et al., Token-level DPO, 2024, arXiv:2404.11999.
    """
    rewards = beta * chosen.log_ratio, beta * rejected.log_ratio
    constant = jax.lax.stop_gradient(_token_kl(chosen))
    difference = alpha * beta * (_token_kl(rejected) - constant)
    return Outcome(-log_sigmoid(rewards[0] - rewards[1] - difference), rewards)


def _token_kl(scores: Scores) -> Array:
    return given(scores.token_kl, "the KL of every token to the reference")
