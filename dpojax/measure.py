"""From a model and a batch to the `Scores` of its completions.

What a loss asks for beside the policy's log-probabilities is computed here, and nothing
that it does not ask for. This file knows no loss and no optimiser.
"""

from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpojax.batch import Batch
from dpojax.log_probs import (
    as_head,
    in_shared_prefix,
    sum_completions,
    token_values,
)
from dpojax.losses.objective import Need
from dpojax.losses.scores import Scores
from dpojax.rewards import completion_rewards
from dpojax.routing import Routing
from dpojax.spread import ALONE, Spread
from dpojax.vocabulary.forward import TokenStatistics
from dpojax.vocabulary.tiles import TILE, Wanted

Params = Any
# (params, batch) -> hidden states [rows, length, width], and the output matrix
# [vocabulary, width] or a `Head`
Apply = Callable[..., tuple[Array, Any]]


# (params, batch) -> what its layers have in common with the reference's, as a third
# argument of `Apply`; or None
Begin = Callable[[Params, Batch], Any]


# Of the policy, over the tokens of completions; in TRL's names.
TokenMetric = Literal["entropy", "mean_token_accuracy"]
_STATISTICS: dict[TokenMetric, Wanted] = {
    "entropy": "entropy",
    "mean_token_accuracy": "top1",
}


class Measured(NamedTuple):
    """What a model makes of a batch."""

    scores: Scores  # each [rows, slots, completions]
    routing: Routing | None  # of the policy, each row's; where it has experts
    token_sums: dict[str, Array] = {}  # by `TokenMetric`, each like those of scores


class _Pieces(TypedDict):
    chunk_size: int
    tile_size: int
    spread: Spread


Measure = Callable[[Params, Params | None, Batch], Measured]  # of policy and reference


def make_measure(
    apply: Apply,
    needs: frozenset[Need],
    *,
    token_metrics: Collection[TokenMetric] = (),
    chunk_size: int = 512,
    tile_size: int = TILE,
    spread: Spread = ALONE,
    begin: Begin = lambda params, batch: None,
) -> Measure:
    """Builds the function that measures completions.

    Args:
      apply: the model: parameters and batch to hidden states and output matrix.
      needs: what to measure beside the policy's log-probabilities.
      token_metrics: what to sum over tokens in the same pass; constants.
      chunk_size: positions of each shard whose logits exist at one time.
      tile_size: tokens of the vocabulary whose logits do.
      spread: the mesh that rows and output matrix are divided over.
      begin: gives what of the policy's pass is the reference's too, and is computed
        once: of adapters in upper layers, the layers below them.

    Returns:
      ``measure(params, reference, batch)``. Where the batch brings the reference's
      log-probabilities along, those are taken, and its parameters may be None.

    Raises:
      ValueError: for metrics of tokens of a reward model.
    """
    check_token_metrics(token_metrics, needs)
    how: _Pieces = {
        "chunk_size": chunk_size,
        "tile_size": tile_size,
        "spread": spread,
    }
    wanted: set[Wanted] = {_STATISTICS[metric] for metric in token_metrics}
    if "log_sum_squares" in needs:
        wanted.add("log_sum_squares")
    if "token_kl" in needs:
        wanted.add("kl")

    def prefix_of(per_token: Array, batch: Batch) -> Array | None:
        """Log-probabilities of what completions share in length."""
        if "prefix" not in needs:
            return None
        inside = jnp.where(in_shared_prefix(batch), per_token, 0.0)
        return sum_completions(inside, batch)

    def under_reference(
        frozen: Any, found: TokenStatistics, batch: Batch
    ) -> dict[str, Any]:
        """The reference's sums, where it is in memory: the batch may bring them."""
        if frozen is None:
            prefix = batch.reference_prefix if "prefix" in needs else None
            return {"reference": batch.reference, "reference_prefix": prefix}
        its = found.other_log_prob
        if its is None:
            hidden, output = frozen
            its = token_values(hidden, output, batch, **how).log_prob
        its = jax.lax.stop_gradient(its)
        whole, prefix = sum_completions(its, batch), prefix_of(its, batch)
        return {"reference": whole, "reference_prefix": prefix}

    def measure(params: Params, reference: Params | None, batch: Batch) -> Measured:
        begun = begin(params, batch)
        complete = apply if begun is None else lambda *of: apply(*of, begun)
        policy = complete(params, batch)
        routing = as_head(policy[1]).routing
        length, score = map(jnp.asarray, (batch.completion_length, batch.score))
        if "reward_head" in needs:
            rewards = completion_rewards(*policy, batch)
            return Measured(Scores(rewards, None, length, score=score), routing)
        frozen = None
        if _takes_parameters(needs, reference, batch):
            # The same function of other parameters: at step 0 the log-ratio is exactly
            # 0.
            frozen = jax.lax.stop_gradient(complete(reference, batch))
        other = frozen if "token_kl" in needs else None
        found = token_values(
            *policy, batch, wanted=frozenset(wanted), other=other, **how
        )
        scores = Scores(
            sum_completions(found.log_prob, batch),
            None,
            length,
            score=score,
            policy_prefix=prefix_of(found.log_prob, batch),
        )
        if found.log_sum_squares is not None:
            squares = sum_completions(found.log_sum_squares, batch)
            scores = scores._replace(log_sum_squares=squares)
        if found.kl is not None:
            scores = scores._replace(token_kl=sum_completions(found.kl, batch))
        if "reference" in needs:
            scores = scores._replace(**under_reference(frozen, found, batch))
        token_sums: dict[str, Array] = {
            metric: sum_completions(found._asdict()[_STATISTICS[metric]], batch)
            for metric in token_metrics
        }
        return Measured(scores, routing, token_sums)

    return measure


def check_token_metrics(
    token_metrics: Collection[TokenMetric], needs: frozenset[Need]
) -> None:
    """Refuses metrics of tokens of a reward model.

    Raises:
      ValueError: naming them.
    """
    if token_metrics and "reward_head" in needs:
        raise ValueError(
            "A reward model predicts no tokens, so there is no "
            f"{' or '.join(token_metrics)}; leave out --token-metrics."
        )


def _takes_parameters(
    needs: frozenset[Need], reference: Params | None, batch: Batch
) -> bool:
    """Whether the reference itself is needed, and not only numbers in the batch."""
    if "reference" not in needs:
        return False
    if batch.reference is None and reference is None:
        raise ValueError(
            "This loss needs a reference; give its parameters, or a batch with its "
            "log-probabilities."
        )
    if batch.reference is not None and "token_kl" in needs:
        raise ValueError(
            "This loss compares whole distributions, so the log-probabilities in the "
            "batch do not do; leave them out and give the reference."
        )
    return batch.reference is None
