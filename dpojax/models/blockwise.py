"""Attention in plain XLA, a block of queries at a time, for whole rows.

Each block of queries meets the keys up to its own end, so that nothing of the size
``[heads, length, length]`` exists and what causality empties is not computed. The
backward pass keeps the output and the logarithm of the softmax's sum, and computes a
block's scores again. This file knows no parameters.

References:
  Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, 2021, arXiv:2112.05682;
  Dao et al., FlashAttention, 2022, arXiv:2205.14135, appendix B (the backward pass).
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.models.attention import HIDDEN, Window, visible
from dpojax.models.remat import as_attention
from dpojax.precision import precision_of


def blockwise_attention(
    query: Float[Array, "rows queries heads dimension"],
    key: Float[Array, "rows length key_heads dimension"],
    value: Float[Array, "rows length key_heads dimension"],
    example: Int[Array, "rows length"],
    branch: Int[Array, "rows length"],
    *,
    window: Window | None = None,
    scale: float | None = None,
    cap: float | None = None,
    block: int | None = None,
    offset: Int[Array, ""] | None = None,
) -> Float[Array, "rows queries heads dimension"]:
    """What `dpojax.models.attention.attention` gives for whole rows.

    Args:
      query: queries of every token of each row, or of those from `offset` on.
      key: keys of every token, of as many heads or a divisor of them.
      value: values likewise.
      example: number of the example that each token belongs to; 0 is padding.
      branch: 0 for a prompt's token, k for one of the k-th completion.
      window: how far back a token sees; None: all of its sequence.
      scale: multiplies the scores; None: ``dimension ** -0.5``.
      cap: scores become ``cap * tanh(score / cap)``; None: they stay.
      block: queries of a block; None: by the rows' length.
      offset: the first query's place in its row, where queries are a part of it. As it
        is not known when the program is compiled, each block meets all keys then.

    Returns:
      The attended values, in the dtype of the queries.
    """
    length = key.shape[1]
    how = _How(
        1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        cap,
        choose_block(length) if block is None else block,
    )
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    rows = _Rows(jnp.asarray(example), jnp.asarray(branch), window, offset)
    heads = (
        jnp.moveaxis(grouped, 1, 3),
        jnp.swapaxes(key, 1, 2),
        jnp.swapaxes(value, 1, 2),
    )
    return jnp.moveaxis(_attend(how, *heads, rows), 3, 1).reshape(query.shape)


def choose_block(length: int) -> int:
    """An eighth of the row, between 128 and 512: few blocks, and little in vain."""
    return min(512, max(128, -(-length // 8 // 128) * 128))


class _How(NamedTuple):
    scale: float
    cap: float | None
    block: int


class _Rows(NamedTuple):
    """What decides who sees whom."""

    example: Array
    branch: Array
    window: Window | None
    offset: Array | None  # of the first query, where queries are a part of the row

    def reach(self, stop: int) -> int:
        """How many keys the queries before `stop` can see."""
        return stop if self.offset is None else self.example.shape[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    how: _How,
    query: Float[Array, "rows key_heads group queries dimension"],
    key: Float[Array, "rows key_heads length dimension"],
    value: Float[Array, "rows key_heads length dimension"],
    rows: _Rows,
) -> Float[Array, "rows key_heads group queries dimension"]:
    return _forward(how, query, key, value, rows)[0]


def _forward(
    how: _How, query: Array, key: Array, value: Array, rows: _Rows
) -> tuple[Array, Array]:
    """The attended values, and the logarithm of each softmax's sum."""
    outputs, normalisers = [], []
    for start, stop in _blocks(query.shape[3], how.block):
        here = _after(query[..., start:stop, :], outputs)
        reach = rows.reach(stop)
        scores = _scores(how, here, key[:, :, :reach])
        scores = jnp.where(_mask(rows, start, stop), scores, HIDDEN)
        maximum = jnp.max(scores, axis=-1)
        weight = jnp.exp(scores - maximum[..., None])
        total = jnp.sum(weight, axis=-1)
        weight = weight.astype(value.dtype)
        output = _contract("rgmqk,rgkd->rgmqd", weight, value[:, :, :reach])
        # The maximum's second use: the normaliser, which would be one, is wanted only
        # where a gradient is taken, and with a single use XLA on CPUs fuses it with an
        # exponential of another last bit. The policy would not be the reference then.
        seen = (maximum > HIDDEN)[..., None]
        output = jnp.where(seen, output / total[..., None], 0.0)
        outputs.append(output.astype(query.dtype))
        normalisers.append(maximum + jnp.log(total))
    return jnp.concatenate(outputs, axis=3), jnp.concatenate(normalisers, axis=3)


def _forward_rule(
    how: _How, query: Array, key: Array, value: Array, rows: _Rows
) -> tuple[Array, tuple]:
    output, normaliser = as_attention(_forward(how, query, key, value, rows))
    return output, (query, key, value, rows, output, normaliser)


def _backward_rule(how: _How, kept: tuple, slope: Array) -> tuple:
    query, key, value, rows, output, normaliser = kept
    exact = slope.astype(jnp.float32)
    drop = jnp.sum(exact * output.astype(jnp.float32), axis=-1, keepdims=True)
    by_query = []
    by_key, by_value = (jnp.zeros(array.shape, jnp.float32) for array in (key, value))
    for start, stop in _blocks(query.shape[3], how.block):
        here = (..., slice(start, stop), slice(None))
        reach = rows.reach(stop)
        seen, read = key[:, :, :reach], value[:, :, :reach]
        asked = _after(query[here], by_query)
        scores = _scores(how, asked, seen)
        weight = jnp.exp(scores - normaliser[..., start:stop, None])
        weight = jnp.where(_mask(rows, start, stop), weight, 0.0)
        by_weight = _contract("rgmqd,rgkd->rgmqk", slope[here], read)
        by_scores = weight * (by_weight - drop[here])
        if how.cap is not None:
            by_scores *= 1 - jnp.square(scores / how.cap)
        by_scores = (by_scores * how.scale).astype(query.dtype)
        weight = weight.astype(value.dtype)
        by_query.append(_contract("rgmqk,rgkd->rgmqd", by_scores, seen))
        added = _contract("rgmqk,rgmqd->rgkd", by_scores, asked)
        by_key = by_key.at[:, :, :reach].add(added)
        added = _contract("rgmqk,rgmqd->rgkd", weight, slope[here])
        by_value = by_value.at[:, :, :reach].add(added)
    whole = jnp.concatenate(by_query, axis=3).astype(query.dtype)
    return whole, by_key.astype(key.dtype), by_value.astype(value.dtype), None


_attend.defvjp(_forward_rule, _backward_rule)


def _blocks(length: int, block: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, block):
        yield start, min(start + block, length)


def _after(queries: Array, done: list[Array]) -> Array:
    """Queries that wait for the blocks before: together these would fill memory."""
    return jax.lax.optimization_barrier((queries, done[-1]))[0] if done else queries


def _mask(rows: _Rows, start: int, stop: int) -> Array:
    """``[rows, 1, 1, queries, keys]`` of the queries from `start` to `stop`."""
    window, reach = rows.window, rows.reach(stop)
    if window is not None:
        window = Window(window.position[:, :reach], window.size)
    example, branch = rows.example[:, :reach], rows.branch[:, :reach]
    first = start if rows.offset is None else start + rows.offset
    return visible(example, branch, stop - start, first, window)[:, None, None]


def _scores(how: _How, query: Array, key: Array) -> Array:
    scores = _contract("rgmqd,rgkd->rgmqk", query, key) * how.scale
    return scores if how.cap is None else how.cap * jnp.tanh(scores / how.cap)


def _contract(indices: str, left: Array, right: Array) -> Array:
    precision = precision_of(left.dtype)
    return jnp.einsum(
        indices, left, right, precision=precision, preferred_element_type=jnp.float32
    )
