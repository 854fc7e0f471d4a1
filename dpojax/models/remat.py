"""What the backward pass finds of each layer: kept, recomputed, or moved to the host.

Layers are scanned, and of each the scan keeps for the backward pass what a policy says.
Values are known by the names that layers give them; this file knows no layer.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

Remat = Literal["none", "dots", "dots_except_up", "save_attention", "full", "offload"]
Body = Callable[[Any, Any], tuple[Any, Any]]  # of a scan

_policies = jax.checkpoint_policies
_ATTENTION, _RESIDUAL = "attention", "residual"
_SAVE_ATTENTION = _policies.save_only_these_names(_ATTENTION)
_POLICIES = {
    # Products of hidden states and weights, not those of queries and keys, whose size
    # is quadratic in the length.
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _SAVE_ATTENTION
    ),
    "dots_except_up": _policies.save_only_these_names(
        _ATTENTION,
        *(f"attention/{name}" for name in ("query", "key", "value", "output")),
        "mlp/gate",
    ),
    "save_attention": _SAVE_ATTENTION,
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematerialize(body: Body, remat: Remat) -> Body:
    """A scan's body of which the backward pass keeps what a policy says.

    Args:
      body: one layer: the carry and what is scanned to the carry and what is stacked.
      remat: ``none`` keeps everything inside a layer; ``dots`` the results of its
        projections and of attention; ``dots_except_up`` those but the MLP's ``up``,
        which is the half of what ``dots`` keeps that one product gives again;
        ``save_attention`` that of attention and what
        else its kernel hands to the backward pass; ``full`` nothing but the layer's
        input; ``offload`` not even that on the device, but on its host.
    """
    return body if remat == "none" else jax.checkpoint(body, policy=_POLICIES[remat])


def rematerialize_indexed(body: Body, remat: Remat) -> Body:
    """The same of a body that takes its layer out of a stack, by an index.

    Whatever is kept, the layer's own arrays are not: the stack has them.
    """
    policy = _all_but_slices if remat == "none" else _POLICIES[remat]
    return jax.checkpoint(body, policy=policy)


def _all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in ("dynamic_slice", "squeeze")


def as_attention(kept: Any) -> Any:
    """Names what attention returns and what else its kernel keeps."""
    return checkpoint_name(kept, _ATTENTION)


def as_projection(product: Array, path: str) -> Array:
    """Names what a projection gives by its place in a layer.

    Rounding to the bits that it has anyway changes no number. JAX does so to what a
    policy keeps, and XLA on CPUs then contracts other products with sums: without it
    everywhere, a forward pass whose gradient is taken differs in its last bits.
    """
    bits = jnp.finfo(product.dtype)
    product = jax.lax.reduce_precision(product, bits.nexp, bits.nmant)
    return checkpoint_name(product, path)


def as_residual(hidden: Array) -> Array:
    """Names the hidden states that enter a layer."""
    return checkpoint_name(hidden, _RESIDUAL)
