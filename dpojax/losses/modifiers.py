"""What turns one loss of pairs into another: divergences, length and weights.

Each modifier changes the `Scores` that a loss sees, or the weight of a pair, so that
any loss for which the theory holds can be combined with it; `f_dpo`, `ld_dpo` and `wpo`
are DPO with one of them. Nothing here knows a model or a batch layout.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from dpojax.losses.pairs import dpo
from dpojax.losses.scores import Outcome, Scores, given

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
Weighting = Literal["aligned", "likelihood"]

# exp of more overflows in float32; TRL clips there as well.
_LARGEST_EXPONENT = 80.0


def f_divergence(
    scores: Scores, *, divergence: Divergence, divergence_alpha: float = 0.5
) -> Scores:
    """Replaces the log-ratio by ``f'(pi / pi_ref) - f'(1)``, 0 where policies agree.

    With ``u = pi / pi_ref``: reverse KL ``log u``, forward KL ``1 - 1 / u``,
    Jensen-Shannon ``log(2 u / (1 + u))``, alpha ``(u^(a - 1) - 1) / (a - 1)``, which
    for a to 1 is the reverse KL. Allowed only where nothing but differences of two of
    them counts: there the partition function cancels.

    Args:
      scores: with reference; each ``[*batch]``.
      divergence: which one constrains the policy.
      divergence_alpha: ``a`` of the alpha divergence (TRL's
        ``f_alpha_divergence_coef``).

    Returns:
      Scores whose log-ratio is the new one.

    References:
      Wang et al., Beyond Reverse KL, 2023, arXiv:2309.16240, table 1.
    """
    log_u = scores.log_ratio

    def power(exponent: Array) -> Array:
        exponent = jnp.minimum(exponent, _LARGEST_EXPONENT)
        # Near 0 the value needs expm1; far below it expm1's derivative cancels.
        near = jnp.abs(exponent) < 1
        return jnp.where(near, jnp.expm1(exponent), jnp.exp(exponent) - 1)

    order = divergence_alpha - 1
    if divergence == "forward_kl":
        log_u = -power(-log_u)
    elif divergence == "js_divergence":
        log_u = log_sigmoid(log_u) + jnp.log(2.0)
    elif divergence == "alpha_divergence" and abs(order) > 1e-6:
        log_u = power(order * log_u) / order
    return scores._replace(policy=log_u, reference=jnp.zeros_like(log_u))


def desensitize(scores: Scores, *, ld_alpha: float) -> Scores:
    """Weighs the tokens beyond the shorter completion's length by `ld_alpha`.

    ``log p(first l tokens) + ld_alpha log p(the rest)``, of policy and reference, l the
    length of the example's shortest completion. With 1 nothing changes.

    Args:
      scores: with the sums over prefixes; each ``[*batch]``.
      ld_alpha: weight of the rest, in [0, 1].

    References:
      Liu et al., LD-DPO, 2024, arXiv:2409.06411.
    """

    def weigh(whole: Array, prefix: Array | None) -> Array:
        prefix = given(prefix, "log-probabilities of prefixes")
        return prefix + ld_alpha * (whole - prefix)

    reference = given(scores.reference, "the reference's log-probabilities")
    return scores._replace(
        policy=weigh(scores.policy, scores.policy_prefix),
        reference=weigh(reference, scores.reference_prefix),
    )


def pair_weight(
    chosen: Scores, rejected: Scores, *, weighting: Weighting
) -> Float[Array, "*batch"]:
    """WPO's weight of a pair: how likely the policy is to have written it.

    The product over both completions of ``exp(mean_t w_t)``, without gradient.
    "aligned" is the authors': ``w_t = log p(y_t) - log sum_v p(v)^2``, so that samples
    of the policy itself weigh about 1. "likelihood" is Open Instruct's: ``w_t = log
    p(y_t)``, a weight of at most 1.

    Args:
      chosen: the preferred completions; each ``[*batch]``.
      rejected: the others, likewise.
      weighting: which of the two.

    References:
      Zhou et al., WPO, 2024, arXiv:2406.11827, eq. 2.
    """

    def log_weight(scores: Scores) -> Array:
        if weighting == "likelihood":
            return scores.average
        squares = given(scores.log_sum_squares, "the sums of squared probabilities")
        return (scores.policy - squares) / scores.divisor

    return jax.lax.stop_gradient(jnp.exp(log_weight(chosen) + log_weight(rejected)))


def f_dpo(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 0.1,
    divergence: Divergence = "js_divergence",
    divergence_alpha: float = 0.5,
) -> Outcome:
    """DPO under another divergence than the reverse KL.

    ``-log sigmoid(beta f'(u_chosen) - beta f'(u_rejected))`` with ``u = pi / pi_ref``
    and f' as in `f_divergence`. The rewards are those of the reverse KL, as TRL's.

    Args:
      chosen: the preferred completions, with reference; each ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the constraint.
      divergence: which one constrains the policy.
      divergence_alpha: ``a`` of the alpha divergence.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Wang et al., Beyond Reverse KL, 2023, arXiv:2309.16240.
    """
    modified = (
        f_divergence(scores, divergence=divergence, divergence_alpha=divergence_alpha)
        for scores in (chosen, rejected)
    )
    plain = dpo(chosen, rejected, beta=beta)
    return plain._replace(loss=dpo(*modified, beta=beta).loss)


def ld_dpo(
    chosen: Scores, rejected: Scores, *, beta: float = 0.1, ld_alpha: float = 0.5
) -> Outcome:
    """Length-desensitised DPO: what exceeds the shorter completion counts less.

    DPO on ``log p(first l tokens) + ld_alpha log p(the rest)``. For ld_alpha 1 it is
    DPO.

    Args:
      chosen: the preferred completions, with reference and prefixes; ``[*batch]``.
      rejected: the others, likewise.
      beta: strength of the KL constraint, per nat.
      ld_alpha: weight of the rest, in [0, 1].

    Returns:
      Loss and implicit rewards of the weighted sums, each ``[*batch]``.

    References:
      Liu et al., LD-DPO, 2024, arXiv:2409.06411.
    """
    chosen = desensitize(chosen, ld_alpha=ld_alpha)
    return dpo(chosen, desensitize(rejected, ld_alpha=ld_alpha), beta=beta)


def wpo(
    chosen: Scores,
    rejected: Scores,
    *,
    beta: float = 0.01,
    weighting: Weighting = "aligned",
) -> Outcome:
    """Weighted Preference Optimization: DPO, its pairs weighted as on-policy samples.

    ``-w(chosen) w(rejected) log sigmoid(h)``, w as in `pair_weight`.

    Args:
      chosen: the preferred completions, with reference and sums of squares.
      rejected: the others, likewise; each ``[*batch]``.
      beta: strength of the KL constraint, per nat; 0.01 in the paper.
      weighting: the authors' weights or Open Instruct's.

    Returns:
      Loss and implicit rewards, each ``[*batch]``.

    References:
      Zhou et al., WPO, 2024, arXiv:2406.11827.
    """
    plain = dpo(chosen, rejected, beta=beta)
    weight = pair_weight(chosen, rejected, weighting=weighting)
    return plain._replace(loss=weight * plain.loss)
