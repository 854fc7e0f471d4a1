"""From hidden states and the output matrix to log-probabilities of completions.

What of the softmax is needed at each scored position, `dpojax.vocabulary` computes in
pieces; here it becomes sums over completions, which stay within their rows, so that
sharded rows need no communication.

Whatever the model computes in, log-softmax and sums are float32: near a sum of 300
nats a bfloat16 step is 2 nats. This file knows no loss and no model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpojax.batch import Batch
from dpojax.routing import Routing
from dpojax.spread import ALONE, Spread
from dpojax.vocabulary.forward import TokenStatistics
from dpojax.vocabulary.statistics import token_statistics
from dpojax.vocabulary.tiles import TILE, How, Operand, Tile, Wanted

Hidden = Float[Array, "rows length width"]


class Head(NamedTuple):
    """An output matrix with what some models add to it.

    The logits are ``z = hidden matrix^T + bias``; with a cap, ``cap * tanh(z / cap)``.
    What routers did to the batch comes along and takes no part in them.
    """

    matrix: Float[Array, "vocabulary width"]
    bias: Float[Array, " vocabulary"] | None = None
    cap: float | Float[Array, ""] | None = None
    routing: Routing | None = None  # of each row; where the model has experts


# What final hidden states meet: a matrix alone, or more.
Output = Float[Array, "vocabulary width"] | Head


def as_head(output: Output) -> Head:
    """The output in its longer form."""
    return output if isinstance(output, Head) else Head(output)


def token_values(
    hidden: Hidden,
    output: Output,
    batch: Batch,
    *,
    wanted: frozenset[Wanted] = frozenset(),
    other: tuple[Hidden, Output] | None = None,
    chunk_size: int = 512,
    tile_size: int = TILE,
    spread: Spread = ALONE,
) -> TokenStatistics:
    """Log-probability of the label of each scored position, and what else is wanted.

    All of it comes from one pass over the vocabulary. Gradients are of ``log_prob`` and
    ``kl``, by `hidden` and `output`; the rest are constants.

    Args:
      hidden: final hidden states ``[rows, length, width]``.
      output: the output matrix ``[vocabulary, width]``, or a `Head`.
      batch: the rows that the hidden states belong to.
      wanted: names of further statistics.
      other: another model's hidden states and output matrix, for ``kl``, KL(other ||
        this), and ``other_log_prob``.
      chunk_size: positions of each shard whose logits exist at one time.
      tile_size: tokens of the vocabulary whose logits do.
      spread: the mesh that rows and matrix are divided over.

    Returns:
      Each ``[rows, length]`` float32; 0 at positions that are not scored.
    """
    return token_statistics(
        How(wanted, chunk_size, spread, tile_size),
        _operand(hidden, output),
        None if other is None else _operand(*other),
        jnp.asarray(batch.labels),
        jnp.asarray(batch.scored),
    )


def completion_log_probs(
    hidden: Hidden,
    output: Output,
    batch: Batch,
    *,
    chunk_size: int = 512,
    spread: Spread = ALONE,
) -> Float[Array, "rows slots completions"]:
    """Log-probability of each completion: the sum over its tokens, in nats.

    Takes what `token_values` takes.

    Returns:
      ``[rows, slots, completions]`` float32; 0 where a slot or completion is empty.
    """
    found = token_values(hidden, output, batch, chunk_size=chunk_size, spread=spread)
    return sum_completions(found.log_prob, batch)


def completion_kl(
    first: tuple[Hidden, Output],
    second: tuple[Hidden, Output],
    batch: Batch,
    *,
    chunk_size: int = 512,
    spread: Spread = ALONE,
) -> Float[Array, "rows slots completions"]:
    """KL(first || second) along each completion, over the whole vocabulary.

    ``sum_t sum_v p(v) (log p(v) - log q(v))``. On completions sampled from the first
    its mean is an unbiased estimate of the sequence-level KL, with less variance than
    the log-ratio of the sampled tokens; it is never negative and 0 for equal models.
    The gradient is by the second alone.

    Args:
      first: hidden states and output matrix of one model.
      second: the same of the other.
      batch: the rows that both belong to.
      chunk_size: positions of each shard whose logits exist at one time.
      spread: the mesh that rows and matrices are divided over.

    Returns:
      ``[rows, slots, completions]`` float32, nats.
    """
    found = token_values(
        *second,
        batch,
        wanted=frozenset({"kl"}),
        other=first,
        chunk_size=chunk_size,
        spread=spread,
    )
    assert found.kl is not None
    return sum_completions(found.kl, batch)


def sum_completions(
    per_token: Float[Array, "rows length"], batch: Batch
) -> Float[Array, "rows slots completions"]:
    """Sums scored positions into their completions, each row for itself."""
    num_slots, num_completions = batch.completion_length.shape[1:]
    example = jnp.arange(1, num_slots + 1)[:, None]
    branch = jnp.arange(1, num_completions + 1)
    # Not a product with a one-hot matrix: accelerators would round it to bfloat16.
    belongs = (jnp.asarray(batch.example)[..., None, None] == example) & (
        jnp.asarray(batch.branch)[..., None, None] == branch
    )
    return jnp.sum(jnp.where(belongs, per_token[..., None, None], 0.0), axis=1)


def in_shared_prefix(batch: Batch) -> Bool[Array, "rows length"]:
    """Scored positions among the first l of their completion.

    l is the length of the shortest completion of their example.
    """
    lengths = jnp.asarray(batch.completion_length)
    none = jnp.iinfo(lengths.dtype).max
    shortest = jnp.min(jnp.where(lengths > 0, lengths, none), axis=-1)
    example, branch = jnp.asarray(batch.example), jnp.asarray(batch.branch)
    scored = jnp.asarray(batch.scored)
    seen = jnp.cumsum(scored, axis=1) - scored  # scored positions of the row before
    ids = jnp.stack([example, branch])
    begins = jnp.any(ids != jnp.roll(ids, 1, axis=2), axis=0).at[:, 0].set(True)
    before = jax.lax.cummax(jnp.where(begins, seen, 0), axis=1)
    slot = jnp.maximum(example - 1, 0)
    limit = jnp.take_along_axis(shortest, slot, axis=1)
    return scored & (seen - before < limit)


def logits_of(
    hidden: Float[Array, "*positions width"], output: Output
) -> Float[Array, "*positions vocabulary"]:
    """Logits in float32; a float32 model gets a true float32 product on every chip."""
    head = as_head(output)
    bias = None if head.bias is None else head.bias.astype(jnp.float32)
    whole = Tile(head.matrix.astype(hidden.dtype), bias, head.cap, 0)
    return whole.logits(hidden)


def _operand(hidden: Hidden, output: Output) -> Operand:
    head = as_head(output)
    return Operand(hidden, head.matrix, head.bias, head.cap)
