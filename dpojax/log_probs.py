"""From hidden states and the output matrix to log-probabilities, in chunks.

Logits of all positions at once would be the largest array of a step by far, so they
exist only for a chunk of positions at a time, and only where a label is scored: the
scored positions are moved to the front, and chunks that hold none are skipped. The
backward pass computes a chunk's logits again instead of keeping them. Positions move
within the rows of one shard only, so that sharded rows need no communication.

Whatever the model computes in, log-softmax and sums are float32: near a sum of 300
nats a bfloat16 step is 2 nats. This file knows no loss and no model.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.batch import Batch
from dpojax.routing import Routing

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


def token_log_probs(
    hidden: Hidden,
    output: Output,
    batch: Batch,
    *,
    chunk_size: int = 512,
    num_shards: int = 1,
) -> Float[Array, "rows length"]:
    """Log-probability of the label of each scored position, in nats; 0 elsewhere.

    Args:
      hidden: final hidden states ``[rows, length, width]``.
      output: the output matrix ``[vocabulary, width]``, or a `Head`.
      batch: the rows that the hidden states belong to.
      chunk_size: positions of each shard whose logits exist at one time.
      num_shards: ways in which the rows are divided over devices.

    Returns:
      ``[rows, length]`` float32.
    """

    def label_log_probs(hidden: Array, labels: Array) -> Array:
        logits = logits_of(hidden, output)
        # A sum over a comparison instead of a gather: its gradient fuses with the
        # softmax's, and a vocabulary that is sharded needs no gather of logits.
        is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
        label_logit = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
        return label_logit - jax.nn.logsumexp(logits, axis=-1)

    arrays = (hidden, jnp.asarray(batch.labels))
    return _map_scored(label_log_probs, batch, chunk_size, num_shards, arrays)


def completion_log_probs(
    hidden: Hidden,
    output: Output,
    batch: Batch,
    *,
    chunk_size: int = 512,
    num_shards: int = 1,
) -> Float[Array, "rows slots completions"]:
    """Log-probability of each completion: the sum over its tokens, in nats.

    Takes what `token_log_probs` takes.

    Returns:
      ``[rows, slots, completions]`` float32; 0 where a slot or completion is empty.
    """
    per_token = token_log_probs(
        hidden, output, batch, chunk_size=chunk_size, num_shards=num_shards
    )
    return sum_completions(per_token, batch)


def completion_log_sum_squares(
    hidden: Hidden,
    output: Output,
    batch: Batch,
    *,
    chunk_size: int = 512,
    num_shards: int = 1,
) -> Float[Array, "rows slots completions"]:
    """Sum over each completion's tokens of ``log sum_v p(v)^2``: 0 where certain.

    The log-probability that two samples of the policy agree at a token. Takes what
    `token_log_probs` takes.

    Returns:
      ``[rows, slots, completions]`` float32.
    """

    def log_sum_squares(hidden: Array) -> Array:
        logits = logits_of(hidden, output)
        twice = jax.nn.logsumexp(2 * logits, axis=-1)
        return twice - 2 * jax.nn.logsumexp(logits, axis=-1)

    per_token = _map_scored(log_sum_squares, batch, chunk_size, num_shards, (hidden,))
    return sum_completions(per_token, batch)


def completion_kl(
    policy: tuple[Hidden, Output],
    reference: tuple[Hidden, Output],
    batch: Batch,
    *,
    chunk_size: int = 512,
    num_shards: int = 1,
) -> Float[Array, "rows slots completions"]:
    """KL(policy || reference) along each completion, over the whole vocabulary.

    ``sum_t sum_v p(v) (log p(v) - log q(v))``. On completions sampled from the policy
    its mean is an unbiased estimate of the sequence-level KL, with less variance than
    the log-ratio of the sampled tokens; it is never negative and 0 for equal models.

    Args:
      policy: hidden states and output matrix of the policy.
      reference: the same of the reference.
      batch: the rows that both belong to.
      chunk_size: positions of each shard whose logits exist at one time.
      num_shards: ways in which the rows are divided over devices.

    Returns:
      ``[rows, slots, completions]`` float32, nats.
    """

    def token_kl(policy_hidden: Array, reference_hidden: Array) -> Array:
        log_p = jax.nn.log_softmax(logits_of(policy_hidden, policy[1]))
        log_q = jax.nn.log_softmax(logits_of(reference_hidden, reference[1]))
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    arrays = (policy[0], reference[0])
    per_token = _map_scored(token_kl, batch, chunk_size, num_shards, arrays)
    return sum_completions(per_token, batch)


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
    exact = hidden.dtype == jnp.float32
    logits = jnp.einsum(
        "...w,vw->...v",
        hidden,
        head.matrix.astype(hidden.dtype),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
    if head.bias is not None:
        logits += head.bias.astype(jnp.float32)
    return logits if head.cap is None else head.cap * jnp.tanh(logits / head.cap)


def _map_scored(
    function: Callable[..., Array],
    batch: Batch,
    chunk_size: int,
    num_shards: int,
    arrays: tuple[Array, ...],
) -> Float[Array, "rows length"]:
    """Applies a function of positions to the scored ones, chunk by chunk.

    `function` maps arrays ``[shards, chunk, ...]`` to ``[shards, chunk]``. Positions
    that are not scored give 0.
    """
    scored = jnp.asarray(batch.scored).reshape(num_shards, -1)
    num_positions = scored.shape[1]
    chunk = min(chunk_size, num_positions)
    num_chunks = -(-num_positions // chunk)
    order: Int[Array, "shards positions"] = jnp.argsort(~scored, axis=1, stable=True)

    def as_chunks(array: Array) -> Array:
        array = array.reshape(num_shards, num_positions, *array.shape[2:])
        trailing = (1,) * (array.ndim - 2)
        array = jnp.take_along_axis(array, order.reshape(order.shape + trailing), 1)
        surplus = num_chunks * chunk - num_positions
        array = jnp.pad(array, [(0, 0), (0, surplus), *((0, 0) for _ in trailing)])
        array = array.reshape(num_shards, num_chunks, chunk, *array.shape[2:])
        return jnp.moveaxis(array, 1, 0)

    most_scored = jnp.max(jnp.sum(scored, axis=1))

    def body(_: None, start_and_chunk: tuple) -> tuple[None, Array]:
        start, chunk_arrays = start_and_chunk
        values = jax.lax.cond(
            start < most_scored,
            function,
            lambda *_: jnp.zeros((num_shards, chunk), jnp.float32),
            *chunk_arrays,
        )
        return None, values

    starts = jnp.arange(num_chunks) * chunk
    chunks = tuple(as_chunks(array) for array in arrays)
    # The checkpoint is around the condition: inside it, the scan would keep for each
    # chunk what the condition hands to the backward pass, a copy of the output matrix.
    _, values = jax.lax.scan(jax.checkpoint(body), None, (starts, chunks))
    values = jnp.moveaxis(values, 0, 1).reshape(num_shards, -1)[:, :num_positions]
    # argsort of a permutation is its inverse: back to the order of the rows.
    values = jnp.take_along_axis(values, jnp.argsort(order, axis=1), axis=1)
    return jnp.where(scored, values, 0.0).reshape(batch.scored.shape)
