"""FLOPs of the flash kernels, from the blocks that the mask of a batch leaves.

The compiler sees a kernel as one call. How often each is called is in the program; what
a call computes is known here: of each pair of blocks of queries and keys that sees
anything, the products of `dpojax.models.flash_kernels`.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from dpojax.batch import Batch
from dpojax.models.attention import Window
from dpojax.models.flash import choose_block
from dpojax.models.flash_plan import NOTHING, visible_blocks
from dpojax.models.shape import DecoderConfig, layer_windows
from dpojax.planning.walk import Kernel

# Products of a block of queries with one of keys, of each kernel.
_PRODUCTS = {
    "flash_forward_kernel": 2,
    "flash_query_kernel": 3,
    "flash_key_kernel": 4,
}


def flash_flops(
    kernels: Mapping[Kernel, float], batch: Batch, config: DecoderConfig
) -> float:
    """FLOPs of one chip's calls.

    Args:
      kernels: custom calls of a program, and how often each runs.
      batch: the rows, on the host.
      config: the model's shape.

    Raises:
      ValueError: for a custom call that is none of ours, whose cost is not known.
    """
    total, blocks = 0.0, 0.0
    for kernel, times in kernels.items():
        if kernel.name not in _PRODUCTS:
            raise ValueError(
                f"The compiled step calls {kernel.name!r}, whose cost is not known, so "
                "that no FLOPs can be told; choose another --attention or --topology, "
                "or a model without experts."
            )
        blocks = blocks or blocks_of_row(batch, config)
        query = next(shape for shape in kernel.operands if len(shape.dimensions) == 4)
        rows, heads, _, dimension = query.dimensions
        area = choose_block(batch.tokens.shape[1]) ** 2
        once = 2.0 * area * dimension * _PRODUCTS[kernel.name]
        total += times * rows * heads * blocks * once
    return total


def blocks_of_row(batch: Batch, config: DecoderConfig) -> float:
    """Pairs of blocks that a row's kernel visits, on average over rows and layers."""
    length = batch.tokens.shape[1]
    block = choose_block(length)
    arrays = [np.asarray(one) for one in (batch.example, batch.branch, batch.position)]
    example, branch, position = (_lengthen(array, -length % block) for array in arrays)
    windows = layer_windows(config)
    found = {}
    for size in set(windows):
        window = None if size is None else Window(position, jnp.asarray(size))
        seen = visible_blocks(example, branch, window, block)
        found[size] = np.count_nonzero(np.asarray(seen) != NOTHING) / len(example)
    return float(np.mean([found[size] for size in windows]))


def _lengthen(array: np.ndarray, missing: int) -> jnp.ndarray:
    return jnp.pad(jnp.asarray(array), [(0, 0), (0, missing)])
