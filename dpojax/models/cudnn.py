"""cuDNN's fused attention for the row layout on NVIDIA GPUs.

cuDNN takes the mask as numbers added to the scores, ``[rows, length, length]`` of them:
heads share it, but blocks that it empties are computed. A test lowers the call for
CUDA; it has never run on a GPU. This file knows the call and what cuDNN does not do.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.models.attention import Window, visible
from dpojax.models.remat import as_attention

_LARGEST_DIMENSION = 256  # 128 before Hopper: jax refuses more there


def cudnn_attention(
    query: Float[Array, "rows length heads dimension"],
    key: Float[Array, "rows length key_heads dimension"],
    value: Float[Array, "rows length key_heads dimension"],
    example: Int[Array, "rows length"],
    branch: Int[Array, "rows length"],
    *,
    window: Window | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "rows length heads dimension"]:
    """Scaled dot-product attention under the mask rule of the row layout.

    Args:
      query: queries of all tokens of each row.
      key: keys; each head of them serves ``heads / key_heads`` heads of queries.
      value: values likewise.
      example: number of the example that each token belongs to; 0 is padding.
      branch: 0 for a prompt's token, k for one of the k-th completion.
      window: how far back a token sees; None: all of its sequence.
      scale: multiplies the scores; None: ``dimension ** -0.5``.
      cap: None: cuDNN has no soft cap.

    Returns:
      The attended values, in the dtype of the queries.

    Raises:
      ValueError: if cuDNN serves no such model or rows.
    """
    _refuse(query, cap)
    mask = visible(example, branch, query.shape[1], window=window)[:, None]
    attended = jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, implementation="cudnn"
    )
    return as_attention(attended)


def _refuse(query: Array, cap: float | None) -> None:
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"cuDNN's attention was given {query.dtype}; it computes in bfloat16 or "
            "float16: choose that compute dtype, or XLA's attention."
        )
    if cap is not None:
        raise ValueError(
            f"cuDNN's attention has no soft cap, and this model's scores are capped at "
            f"{cap}; use XLA's attention for it."
        )
    length, dimension = query.shape[1], query.shape[3]
    if dimension > _LARGEST_DIMENSION or dimension % 8:
        raise ValueError(
            f"cuDNN's attention serves heads of at most {_LARGEST_DIMENSION} "
            f"dimensions, a multiple of 8, not {dimension}; use XLA's for this model."
        )
    if length % 2:
        raise ValueError(
            f"cuDNN's attention was given rows of {length} tokens; it needs an even "
            "number for its gradient: lengthen the rows by one."
        )
