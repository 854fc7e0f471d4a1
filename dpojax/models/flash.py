"""Flash attention for the row layout on TPUs.

The same numbers as `dpojax.models.attention` gives, but scores exist a block at a time,
and a row costs only the blocks in which its examples see something. This file joins
the kernels: the derivative rule, lengths that blocks do not divide, what is refused.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.models.attention import Window
from dpojax.models.flash_calls import (
    Inputs,
    Slopes,
    backward_to_key,
    backward_to_query,
    forward,
)
from dpojax.models.flash_kernels import LANES, Settings
from dpojax.models.flash_plan import Facts, Plan, count_pairs, make_facts, make_plans
from dpojax.models.remat import as_attention

_LARGEST_BLOCK = 512
LARGEST_DIMENSION = 256
_MOST_PAIRS = 40_000  # six integers each, in 1 MiB of scalar memory


class _Rows(NamedTuple):
    """What is known of the rows before any query: the mask, and what is to be done."""

    facts: Facts
    by_query: Plan
    by_key: Plan


def flash_attention(
    query: Float[Array, "rows length heads dimension"],
    key: Float[Array, "rows length key_heads dimension"],
    value: Float[Array, "rows length key_heads dimension"],
    example: Int[Array, "rows length"],
    branch: Int[Array, "rows length"],
    *,
    window: Window | None = None,
    scale: float | None = None,
    cap: float | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "rows length heads dimension"]:
    """Scaled dot-product attention under the mask rule of the row layout.

    Softmax and sums are in float32, products in the dtype of the queries, exact for
    float32. Padding gets 0, where `attention` gives it a mean of padding's values;
    nothing depends on either. A gradient keeps what is returned and one number per
    query and head, both under the name "attention": with the policy
    ``jax.checkpoint_policies.save_only_these_names("attention")`` a rematerialised
    layer does not run the forward kernel again. Under a mesh call it through
    `dpojax.sharding.make_by_shard_and_head`: kernels are not partitioned by XLA.

    Args:
      query: queries of all tokens of each row.
      key: keys; each head of them serves ``heads / key_heads`` heads of queries.
      value: values likewise.
      example: number of the example that each token belongs to; 0 is padding.
      branch: 0 for a prompt's token, k for one of the k-th completion.
      window: how far back a token sees; None: all of its sequence.
      scale: multiplies the scores; None: ``dimension ** -0.5``.
      cap: scores become ``cap * tanh(score / cap)``; None: they stay.
      block: tokens of a block, on a TPU a multiple of 128; None: at most 512.
      interpret: XLA computes what the kernels would, slowly, on any device.

    Returns:
      The attended values, in the dtype of the queries.

    Raises:
      ValueError: if the kernels serve no such shapes or dtypes.
    """
    length, dimension = query.shape[1], query.shape[3]
    if block is None:
        block = choose_block(length)
    _refuse(query, key, value, block, interpret)
    settings = Settings(
        scale=dimension**-0.5 if scale is None else scale,
        cap=cap,
        block=block,
        interpret=interpret,
    )
    missing = -length % block

    def lengthen(array: Array) -> Array:
        widths = [(0, missing if axis == 1 else 0) for axis in range(array.ndim)]
        return jnp.pad(array, widths)

    example, branch = lengthen(example), lengthen(branch)
    if window is not None:
        window = Window(lengthen(window.position), window.size)
    plans = make_plans(example, branch, window, block)
    rows = _Rows(make_facts(example, branch, window), *plans)
    query, key, value = lengthen(query), lengthen(key), lengthen(value)
    attended: Any = _flash(settings, query, key, value, rows)
    return attended[:, :length]


def choose_block(length: int) -> int:
    """A multiple of 128 of at most 512 that fills rows of a length up evenly."""
    num_blocks = -(-length // _LARGEST_BLOCK)
    return LANES * -(-length // (num_blocks * LANES))


def _refuse(query: Array, key: Array, value: Array, block: int, is_free: bool) -> None:
    dtypes = [str(array.dtype) for array in (query, key, value)]
    if len(set(dtypes)) > 1 or dtypes[0] not in ("float32", "bfloat16"):
        raise ValueError(
            f"Flash attention was given queries, keys and values of {dtypes}; it takes "
            "all three in float32 or all in bfloat16: set the compute dtype to one."
        )
    num_rows, length, num_heads, dimension = query.shape
    if num_heads % key.shape[2]:
        raise ValueError(
            f"Flash attention was given {num_heads} heads of queries and {key.shape[2]}"
            " of keys; the latter must divide the former."
        )
    if dimension > LARGEST_DIMENSION:
        raise ValueError(
            f"Flash attention serves heads of at most {LARGEST_DIMENSION} dimensions, "
            f"not {dimension}; use XLA's attention for this model."
        )
    if block < 1 or (block % LANES and not is_free):
        raise ValueError(
            f"Flash attention was given blocks of {block} tokens; on a TPU they are "
            f"multiples of {LANES}."
        )
    num_pairs = count_pairs(num_rows, -(-length // block))
    if num_pairs > _MOST_PAIRS:
        raise ValueError(
            f"Flash attention was given {num_rows} rows of {length} tokens on a device,"
            f" {num_pairs} pairs of blocks of {block}; a TPU has room for the plan of "
            f"{_MOST_PAIRS}: give it fewer rows at a time."
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    settings: Settings, query: Array, key: Array, value: Array, rows: _Rows
) -> Array:
    return _flash_forward(settings, query, key, value, rows)[0]


def _flash_forward(
    settings: Settings, query: Array, key: Array, value: Array, rows: _Rows
) -> tuple[Array, tuple[Any, ...]]:
    heads = _heads_first(query), _heads_first(key), _heads_first(value)
    inputs = Inputs(*heads, rows.facts)
    found = forward(settings, inputs, rows.by_query)
    attended, logsumexp = as_attention(found)
    return _heads_first(attended), (inputs, rows, attended, logsumexp)


def _flash_backward(
    settings: Settings, kept: tuple[Any, ...], slope: Array
) -> tuple[Array, Array, Array, None]:
    inputs, rows, attended, logsumexp = kept
    slope = _heads_first(slope)
    product = attended.astype(jnp.float32) * slope.astype(jnp.float32)
    delta = jnp.sum(product, axis=-1)[:, :, None]
    slopes = Slopes(slope, logsumexp, delta)
    to_query = backward_to_query(settings, inputs, slopes, rows.by_query)
    to_key, to_value = backward_to_key(settings, inputs, slopes, rows.by_key)
    return _heads_first(to_query), _heads_first(to_key), _heads_first(to_value), None


def _heads_first(array: Array) -> Array:
    """Heads before tokens, as kernels need them; and the way back."""
    return array.swapaxes(1, 2)


_flash.defvjp(_flash_forward, _flash_backward)
