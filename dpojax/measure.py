"""From a model and a batch to the `Scores` of its completions.

What a loss asks for beside the policy's log-probabilities is computed here, and nothing
that it does not ask for. This file knows no loss and no optimiser.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpojax.batch import Batch
from dpojax.log_probs import (
    Output,
    as_head,
    completion_kl,
    completion_log_sum_squares,
    in_shared_prefix,
    sum_completions,
    token_log_probs,
)
from dpojax.losses.objective import Need
from dpojax.losses.scores import Scores
from dpojax.rewards import completion_rewards
from dpojax.routing import Routing

Params = Any
# (params, batch) -> hidden states [rows, length, width], and the output matrix
# [vocabulary, width] or a `Head`
Apply = Callable[[Params, Batch], tuple[Array, Any]]


class Measured(NamedTuple):
    """What a model makes of a batch."""

    scores: Scores  # each [rows, slots, completions]
    routing: Routing | None  # of the policy, each row's; where it has experts


Measure = Callable[[Params, Params | None, Batch], Measured]  # of policy and reference


def make_measure(
    apply: Apply, needs: frozenset[Need], *, chunk_size: int, num_shards: int
) -> Measure:
    """Builds the function that measures completions.

    Args:
      apply: the model: parameters and batch to hidden states and output matrix.
      needs: what to measure beside the policy's log-probabilities.
      chunk_size: positions of each shard whose logits exist at one time.
      num_shards: ways in which the rows are divided over devices.

    Returns:
      ``measure(params, reference, batch)``. Where the batch brings the reference's
      log-probabilities along, those are taken, and its parameters may be None.
    """
    how = {"chunk_size": chunk_size, "num_shards": num_shards}

    def sums(hidden: Array, output: Output, batch: Batch) -> tuple[Array, Array | None]:
        """Log-probabilities of whole completions, and of their shared prefixes."""
        per_token = token_log_probs(hidden, output, batch, **how)
        whole = sum_completions(per_token, batch)
        if "prefix" not in needs:
            return whole, None
        inside = jnp.where(in_shared_prefix(batch), per_token, 0.0)
        return whole, sum_completions(inside, batch)

    def measure(params: Params, reference: Params | None, batch: Batch) -> Measured:
        policy = apply(params, batch)
        if "reward_head" in needs:
            whole, prefix = completion_rewards(*policy, batch), None
        else:
            whole, prefix = sums(*policy, batch)
        scores = Scores(
            whole,
            None,
            jnp.asarray(batch.completion_length),
            score=jnp.asarray(batch.score),
            policy_prefix=prefix,
        )
        if "log_sum_squares" in needs:
            constant = jax.lax.stop_gradient(policy)
            squares = completion_log_sum_squares(*constant, batch, **how)
            scores = scores._replace(log_sum_squares=squares)
        if "reference" in needs and batch.reference is not None:
            if "token_kl" in needs:
                raise ValueError(
                    "This loss compares whole distributions, so the log-probabilities "
                    "in the batch do not do; leave them out and give the reference."
                )
            scores = scores._replace(
                reference=jnp.asarray(batch.reference),
                reference_prefix=None if prefix is None else batch.reference_prefix,
            )
        elif "reference" in needs:
            if reference is None:
                raise ValueError(
                    "This loss needs a reference; give its parameters, or a batch with "
                    "its log-probabilities."
                )
            # The same function of other parameters: at step 0 the log-ratio is exactly
            # 0.
            frozen = jax.lax.stop_gradient(apply(reference, batch))
            whole, prefix = jax.lax.stop_gradient(sums(*frozen, batch))
            scores = scores._replace(reference=whole, reference_prefix=prefix)
            if "token_kl" in needs:
                kl = completion_kl(frozen, policy, batch, **how)
                scores = scores._replace(token_kl=kl)
        return Measured(scores, as_head(policy[1]).routing)

    return measure
