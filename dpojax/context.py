"""How the positions of long rows lie on a mesh, for attention.

Devices of the axis `context` share each row: every one has the hidden states of a part
of its positions, and all that is computed of each token by itself stays there. For
attention they gather keys and values of the whole row, which grouped queries keep
small, and each attends from its own positions. This file knows no kernel.

References:
  Grattafiori et al., The Llama 3 Herd of Models, 2024, arXiv:2407.21783, section 3.3.2
  (context parallelism by all-gather).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dpojax.expert_shards import gather_exactly
from dpojax.sharding import ROWS, TOKENS

AXIS = "context"


def make_by_context(
    mesh: Mesh,
) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    """Makes attention be computed by each part of the rows for itself.

    The function takes query, key, value, example and branch, keywords, and ``offset``:
    the place of the first of its queries. Heads are divided by ``tensor`` if it divides
    all their numbers, else computed by each.
    """
    num_parts = mesh.shape[AXIS]

    def by_context(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def call(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            example: jax.Array,
            branch: jax.Array,
            *,
            window: Any,
            **fixed: Any,
        ) -> jax.Array:
            length = query.shape[1]
            if length % num_parts:
                raise ValueError(
                    f"Rows of {length} positions cannot be divided by --mesh.context "
                    f"{num_parts}; give a --row-length that is a multiple of it."
                )

            def attend(query: Any, key: Any, value: Any, rows: Any) -> jax.Array:
                offset = jax.lax.axis_index(AXIS) * query.shape[1]
                key = gather_exactly(key, AXIS, 1)
                value = gather_exactly(value, AXIS, 1)
                *numbers, window = rows
                found = partial(function, window=window, offset=offset, **fixed)
                return found(query, key, value, *numbers)

            counts = query.shape[2], key.shape[2]
            divided = all(count % mesh.shape["tensor"] == 0 for count in counts)
            heads = PartitionSpec(*TOKENS, "tensor" if divided else None)
            rows = example, branch, window
            of_rows = jax.tree.map(
                lambda leaf: ROWS if jnp.ndim(leaf) else PartitionSpec(), rows
            )
            return jax.shard_map(
                attend,
                mesh=mesh,
                in_specs=(heads, heads, heads, of_rows),
                out_specs=heads,
                check_vma=False,
            )(query, key, value, rows)

        return call

    return by_context if num_parts > 1 else lambda function: function
