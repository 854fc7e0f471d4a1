"""Attention under the mask rule of the row layout.

Token j is visible to token i when ``j <= i``, both belong to one example, and j stands
in the prompt or in i's own completion; under a window also only when j's position is
less than that behind i's. Padding is example 0 and sees only padding, so
no softmax is empty. This file knows no parameters.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Not minus infinity: of a row that sees nothing, the softmax stays finite.
HIDDEN = float(jnp.finfo(jnp.float32).min)


class Window(NamedTuple):
    """How far behind its own position a token sees."""

    position: Int[Array, "rows keys"]  # of every key in its own sequence
    size: int | Int[Array, ""]


def visible(
    example: Int[Array, "rows keys"],
    branch: Int[Array, "rows keys"],
    num_queries: int,
    offset: int | Int[Array, ""] = 0,
    window: Window | None = None,
) -> Bool[Array, "rows queries keys"]:
    """Which keys each query sees; queries are the keys from `offset` on."""

    def of_queries(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, offset, num_queries, axis=1)

    key_index = jnp.arange(example.shape[1])
    query_index = offset + jnp.arange(num_queries)
    query_branch = of_queries(branch)[:, :, None]
    seen = (
        (key_index <= query_index[:, None])
        & (example[:, None, :] == of_queries(example)[:, :, None])
        & ((branch[:, None, :] == 0) | (branch[:, None, :] == query_branch))
    )
    if window is None:
        return seen
    distance = of_queries(window.position)[:, :, None] - window.position[:, None, :]
    return seen & (distance < window.size)


def attention(
    query: Float[Array, "rows queries heads dimension"],
    key: Float[Array, "rows keys key_heads dimension"],
    value: Float[Array, "rows keys key_heads dimension"],
    example: Int[Array, "rows keys"],
    branch: Int[Array, "rows keys"],
    offset: int | Int[Array, ""] = 0,
    *,
    window: Window | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "rows queries heads dimension"]:
    """Scaled dot-product attention with grouped queries, softmax in float32.

    Args:
      query: queries of the tokens ``offset, ..., offset + queries - 1`` of each row.
      key: keys of every token of each row.
      value: values likewise.
      example: number of the example that each key belongs to; 0 is padding.
      branch: 0 for a prompt's token, k for one of the k-th completion.
      offset: index in the row of the first query.
      window: how far back a token sees; None: all of its sequence.
      scale: multiplies the scores; None: ``dimension ** -0.5``.
      cap: scores become ``cap * tanh(score / cap)``; None: they stay.

    Returns:
      The attended values, in the dtype of the queries.
    """
    mask = visible(example, branch, query.shape[1], offset, window)[:, None]
    if cap is None:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, implementation="xla"
        )
    scaled = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _capped_attention(query, key, value, mask, scaled, cap)


def _capped_attention(
    query: Array, key: Array, value: Array, mask: Array, scale: float, cap: float
) -> Array:
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum(
        "rqhgd,rkhd->rhgqk", grouped, key, preferred_element_type=jnp.float32
    )
    scores = cap * jnp.tanh(scores * scale / cap)
    scores = jnp.where(mask[:, :, None], scores, HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("rhgqk,rkhd->rqhgd", weights, value).reshape(query.shape)
