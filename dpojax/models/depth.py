"""All layers of a decoder, one after another: scanned, so that a program stays small.

Where only the upper layers have adapters, those below are a scan of their own, without
any: nothing of it depends on what is trained, so that it has no backward pass, and of
several runs' adapters there is one. This file knows neither attention nor training.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dpojax.models.block import Block
from dpojax.models.layers import Layer
from dpojax.models.remat import Body, Remat, rematerialize, rematerialize_indexed


class Depth(NamedTuple):
    """How layers follow one another."""

    remat: Remat
    trunk: int  # its layers, all below the first adapter
    make_plain: Callable[[nnx.Rngs], Block]  # a layer without adapters


class Begun(NamedTuple):
    """Where the trunk ends."""

    carry: Any  # what leaves its last layer
    kept: Any  # of each of its layers, stacked


def scan_layers(
    body: Body, carry: Any, blocks: Block, layers: Layer, depth: Depth
) -> tuple[Any, Any]:
    """Passes all layers.

    Args:
      body: one layer: the carry, and ``(block, layer)``, to the carry and what is kept.
      carry: what enters the first.
      blocks: stacked, their adapters only of the layers that have any.
      layers: in what they differ, stacked.
      depth: how they follow one another.

    Returns:
      What leaves the last, and what was kept of each, stacked.
    """
    if depth.trunk == 0:
        return jax.lax.scan(rematerialize(body, depth.remat), carry, (blocks, layers))
    begun = begin_layers(body, carry, blocks, layers, depth)
    return end_layers(body, begun, blocks, layers, depth)


def begin_layers(
    body: Body, carry: Any, blocks: Block, layers: Layer, depth: Depth
) -> Begun:
    """Passes the trunk; takes what `scan_layers` takes."""
    _, _, base = nnx.split(blocks, is_of_adapter, ...)
    plain, _ = nnx.split(nnx.eval_shape(depth.make_plain, nnx.Rngs(0)))

    def pass_one(carry: Any, layer: Layer) -> tuple[Any, Any]:
        return body(carry, (nnx.merge(plain, _of_layer(base, layer)), layer))

    lower = jax.tree.map(lambda array: array[: depth.trunk], layers)
    return Begun(*jax.lax.scan(pass_one, carry, lower))


def end_layers(
    body: Body, begun: Begun, blocks: Block, layers: Layer, depth: Depth
) -> tuple[Any, Any]:
    """Passes the layers above the trunk; gives what `scan_layers` gives."""
    graph, adapters, base = nnx.split(blocks, is_of_adapter, ...)

    def pass_one(carry: Any, adapters_and_layer: tuple) -> tuple[Any, Any]:
        adapters, layer = adapters_and_layer
        block = nnx.merge(graph, adapters, _of_layer(base, layer))
        return body(carry, (block, layer))

    upper = jax.tree.map(lambda array: array[depth.trunk :], layers)
    remat_body = rematerialize_indexed(pass_one, depth.remat)
    carry, kept = jax.lax.scan(remat_body, begun.carry, (adapters, upper))
    return carry, jax.tree.map(lambda *two: jnp.concatenate(two), begun.kept, kept)


def leave_out_adapters(blocks: Block, trunk: int) -> Block:
    """Stacked layers of which the first ones have no adapters."""
    graph, adapters, base = nnx.split(blocks, is_of_adapter, ...)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[trunk:], adapters), base)


def is_of_adapter(path: tuple, value: Any) -> bool:
    """Whether a parameter of a layer belongs to an adapter."""
    return "lora" in path


def _of_layer(base: Any, layer: Layer) -> Any:
    """A layer's arrays, from the whole stack: a scan over a part of it would copy."""

    def take(stack: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(stack, layer.index, keepdims=False)

    return jax.tree.map(take, base)
