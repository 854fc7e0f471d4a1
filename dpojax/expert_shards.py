"""How experts and their rows lie on a mesh.

Devices of every axis but `tensor` see different rows, and tokens are sorted by expert
on each for itself. Those of `expert` have different experts too: they hand each other
their rows, compute what their own experts make of them, and hand the sums back. No
token is dropped, however uneven the choices, and nothing is as large as what it costs
to be prepared for that. This file knows neither experts nor rows from the inside.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array


class ExpertShard(NamedTuple):
    """One device's part of the experts; without an axis, all of them are here."""

    axis: str | None = None

    def first(self, num_own: int) -> Array | None:
        """The first expert of those that are here; None where all are."""
        return None if self.axis is None else jax.lax.axis_index(self.axis) * num_own

    def gather(self, rows: Any) -> Any:
        """Arrays, rows first, with the rows of all devices that share experts."""
        if self.axis is None:
            return rows
        axis = self.axis
        return jax.tree.map(lambda array: gather_exactly(array, axis), rows)

    def scatter(self, rows: Array) -> Array:
        """The sum over these devices, of this device's own rows."""
        if self.axis is None:
            return rows
        return jax.lax.psum_scatter(rows, self.axis, scatter_dimension=0, tiled=True)


# (weights, rows, shard) -> rows
OfShard = Callable[[Any, Any, ExpertShard], Any]
# The same of each shard of the rows, to a function of all weights and rows
ByShard = Callable[[OfShard], Callable[[Any, Any], Any]]


def alone(function: OfShard) -> Callable[[Any, Any], Any]:
    """The `ByShard` of one shard."""
    return lambda weights, rows: function(weights, rows, ExpertShard())


def make_by_shard(mesh: Mesh) -> ByShard:
    """Makes functions of weights and rows be computed by each shard of rows for itself.

    What is sorted or grouped inside, no token leaves its device for it, but for the
    shard's own `gather`. The function takes weights, gathered whole but for ``tensor``
    and, in their first dimension, ``expert``; and arrays whose rows come first; it
    returns such arrays.
    """
    axes = tuple(axis for axis in ("data", "fsdp", "expert") if mesh.shape[axis] > 1)
    is_shared = "expert" in axes
    shard = ExpertShard("expert" if is_shared else None)
    copied = tuple(axis for axis in axes if axis != "expert")
    rows = PartitionSpec(axes)

    def by_shard(function: OfShard) -> Callable[[Any, Any], Any]:
        if not axes:
            return alone(function)
        return jax.shard_map(
            lambda weights, arrays: function(_spread(weights, copied), arrays, shard),
            mesh=mesh,
            in_specs=(PartitionSpec("expert") if is_shared else PartitionSpec(), rows),
            out_specs=rows,
            axis_names=set(axes),
        )

    return by_shard


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(weights: Any, axes: tuple[str, ...]) -> Any:
    """Weights as each shard's own; their gradients are summed in float32.

    In bfloat16 the sum over many shards would be inexact, and XLA's compiler for CPUs
    ends the process over it.
    """
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), weights)


def _spread_forward(weights: Any, axes: tuple[str, ...]) -> tuple[Any, None]:
    return _spread(weights, axes), None


def _spread_backward(axes: tuple[str, ...], _: None, slopes: Any) -> tuple[Any]:
    def total(slope: jax.Array) -> jax.Array:
        return jax.lax.psum(slope.astype(jnp.float32), axes).astype(slope.dtype)

    return (jax.tree.map(total, slopes),)


_spread.defvjp(_spread_forward, _spread_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_exactly(array: Array, axis: str, dimension: int = 0) -> Array:
    """The parts of all devices of an axis; their gradients are summed in float32 too.

    Args:
      array: this device's part.
      axis: of the mesh.
      dimension: that is divided.
    """
    return jax.lax.all_gather(array, axis, axis=dimension, tiled=True)


def _gather_forward(array: Array, axis: str, dimension: int) -> tuple[Array, None]:
    return gather_exactly(array, axis, dimension), None


def _gather_backward(axis: str, dimension: int, _: None, slope: Array) -> tuple[Array]:
    whole = jax.lax.psum_scatter(
        slope.astype(jnp.float32), axis, scatter_dimension=dimension, tiled=True
    )
    return (whole.astype(slope.dtype),)


gather_exactly.defvjp(_gather_forward, _gather_backward)
