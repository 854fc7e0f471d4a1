"""Attention under the mask rule of the row layout.

Token j is visible to token i when ``j <= i``, both belong to one example, and j stands
in the prompt or in i's own completion. Padding is example 0 and sees only padding, so
no softmax is empty. This file knows no parameters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(
    example: Int[Array, "rows keys"],
    branch: Int[Array, "rows keys"],
    num_queries: int,
    offset: int | Int[Array, ""] = 0,
) -> Bool[Array, "rows queries keys"]:
    """Which keys each query sees; queries are the keys from `offset` on."""

    def of_queries(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, offset, num_queries, axis=1)

    key_index = jnp.arange(example.shape[1])
    query_index = offset + jnp.arange(num_queries)
    query_branch = of_queries(branch)[:, :, None]
    return (
        (key_index <= query_index[:, None])
        & (example[:, None, :] == of_queries(example)[:, :, None])
        & ((branch[:, None, :] == 0) | (branch[:, None, :] == query_branch))
    )


def attention(
    query: Float[Array, "rows queries heads dimension"],
    key: Float[Array, "rows keys key_heads dimension"],
    value: Float[Array, "rows keys key_heads dimension"],
    example: Int[Array, "rows keys"],
    branch: Int[Array, "rows keys"],
    offset: int | Int[Array, ""] = 0,
) -> Float[Array, "rows queries heads dimension"]:
    """Scaled dot-product attention with grouped queries, softmax in float32.

    Args:
      query: queries of the tokens ``offset, ..., offset + queries - 1`` of each row.
      key: keys of every token of each row.
      value: values likewise.
      example: number of the example that each key belongs to; 0 is padding.
      branch: 0 for a prompt's token, k for one of the k-th completion.
      offset: index in the row of the first query.

    Returns:
      The attended values, in the dtype of the queries.
    """
    mask = visible(example, branch, query.shape[1], offset)
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None], implementation="xla"
    )
