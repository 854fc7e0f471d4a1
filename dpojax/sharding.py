"""The mesh, and regular expressions over parameter paths to shardings.

Sharding is a property of the run, not of the model: this file knows paths and shapes
only, and the same rules cover parameters, the reference and the optimiser's state,
whose paths end in those of the parameters.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

Batch = TypeVar("Batch")
AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # rows of a batch, and of activations

# First match wins; a dimension that its axes do not divide stays whole.
RULES = (
    (r"score/embedding$", PartitionSpec()),  # one row: not worth gathering
    (r"embedding$", PartitionSpec("tensor", "fsdp")),
    # Every device has a part of every expert; a router is too small to be gathered.
    (r"experts/(gate|up)/kernel$", PartitionSpec(None, None, "fsdp", "tensor")),
    (r"experts/down/kernel$", PartitionSpec(None, None, "tensor", "fsdp")),
    (r"(query|key|value|gate|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"(output|down)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"(query|key|value|gate|up)/lora/a$", PartitionSpec(None, "fsdp", None)),
    (r"(query|key|value|gate|up)/lora/b$", PartitionSpec(None, None, "tensor")),
    (r"(output|down)/lora/a$", PartitionSpec(None, "tensor", None)),
    (r"(output|down)/lora/b$", PartitionSpec(None, None, "fsdp")),
    (r"(query|key|value)/bias$", PartitionSpec(None, "tensor")),
    (r"", PartitionSpec()),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices.

    Args:
      data: copies of the model that see different rows.
      fsdp: devices that share one copy's parameters and see different rows.
      tensor: devices that share each matrix product.
      One of them may be -1: what is left of the devices.
      devices: others than those that are there.

    Raises:
      ValueError: if the product is not the number of devices.
    """
    num_devices = jax.device_count() if devices is None else len(devices)
    sizes = mesh_sizes(data, fsdp, tensor, num_devices)
    types = (AxisType.Auto,) * 3
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)


def mesh_sizes(
    data: int, fsdp: int, tensor: int, num_devices: int
) -> tuple[int, int, int]:
    """The sizes of `make_mesh`'s axes, none of them -1."""
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        known = max(1, -data * fsdp * tensor)
        sizes[sizes.index(-1)] = max(1, num_devices // known)
    if min(sizes) < 1 or sizes[0] * sizes[1] * sizes[2] != num_devices:
        raise ValueError(
            f"The mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit "
            f"{num_devices} devices; their product must be that number."
        )
    return sizes[0], sizes[1], sizes[2]


def as_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A sharding for every array of a tree, by its path and shape."""

    def choose(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for rule, spec in RULES if re.search(rule, name))
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))

    return jax.tree.map_with_path(choose, tree)


def _fit(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    if len(shape) < len(spec):  # an optimiser's statistic of fewer dimensions
        return PartitionSpec()
    axes = [
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    return PartitionSpec(*axes)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every device that holds or shares a copy of the model."""
    return NamedSharding(mesh, ROWS)


class Placement(NamedTuple):
    """How rows reach the devices."""

    put: Callable[[Any], Any]  # host arrays, rows first, to sharded ones
    num_shards: int  # ways in which rows are divided; their number is a multiple
    mesh: Mesh


def make_placement(mesh: Mesh) -> Placement:
    """Rows over all devices of a mesh that see different ones."""
    sharding = rows_sharding(mesh)

    def put(rows: Any) -> Any:
        # Not device_put: between processes it would wait for the devices, to compare
        # what each of them was given.
        return jax.tree.map(
            lambda array: jax.make_array_from_callback(
                array.shape, sharding, array.__getitem__
            ),
            rows,
        )

    return Placement(put, num_row_shards(mesh), mesh)


def put_ahead(
    batches: Iterable[Batch], put: Callable[[Batch], Batch]
) -> Iterator[tuple[Batch, Batch]]:
    """Each batch on the host and on the devices, where the next one is on its way.

    Args:
      batches: rows on the host.
      put: sends them off to the devices, and does not wait for their arrival.
    """
    waiting: list[tuple[Batch, Batch]] = []
    for batch in batches:
        waiting.append((batch, put(batch)))
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def num_row_shards(mesh: Mesh) -> int:
    """How many ways the rows of a batch are divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def make_by_shard(mesh: Mesh) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes functions of weights and rows be computed by each shard of rows for itself.

    What is sorted or grouped inside, no token leaves its device for it. The function
    takes weights, gathered whole but for ``tensor``, and arrays whose rows come first;
    it returns such arrays.
    """
    axes = tuple(axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1)
    rows = PartitionSpec(axes)

    def by_shard(function: Callable[..., Any]) -> Callable[..., Any]:
        if not axes:
            return function
        return jax.shard_map(
            lambda weights, arrays: function(_spread(weights, axes), arrays),
            mesh=mesh,
            in_specs=(PartitionSpec(), rows),
            out_specs=rows,
            axis_names=set(axes),
        )

    return by_shard


def make_by_shard_and_head(
    mesh: Mesh,
) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    """Makes attention be computed by each shard of rows and heads for itself.

    XLA does not partition kernels. The function takes arrays of rows first, those of
    four dimensions with heads third, and numbers; it returns one like the first. Heads
    are divided by ``tensor`` if it divides all their numbers, else computed by each.
    """

    def by_shard(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def call(*arrays: Any, **more: Any) -> jax.Array:
            leaves = jax.tree.leaves((arrays, more))
            counts = [leaf.shape[2] for leaf in leaves if jnp.ndim(leaf) == 4]
            divided = all(count % mesh.shape["tensor"] == 0 for count in counts)
            heads = PartitionSpec(*ROWS, None, "tensor" if divided else None)

            def choose(leaf: Any) -> PartitionSpec:
                specs = {0: PartitionSpec(), 4: heads}
                return specs.get(jnp.ndim(leaf), ROWS)

            return jax.shard_map(
                lambda arrays, more: function(*arrays, **more),
                mesh=mesh,
                in_specs=jax.tree.map(choose, (arrays, more)),
                out_specs=heads,
                # A kernel does not say along which axes its results differ.
                check_vma=False,
            )(arrays, more)

        return function if mesh.size == 1 else call

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


def make_constrain(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Pins hidden states to the sharding of their rows.

    Pinned once, in the layer scan, the compiler does not move them between layers.
    """
    sharding = rows_sharding(mesh)
    return lambda hidden: jax.lax.with_sharding_constraint(hidden, sharding)
