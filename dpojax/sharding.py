"""The mesh, and regular expressions over parameter paths to shardings.

Sharding is a property of the run, not of the model: this file knows paths and shapes
only, and the same rules cover parameters, the reference and the optimiser's state,
whose paths end in those of the parameters.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from dpojax.slices import Devices, arrange

Batch = TypeVar("Batch")
Placed = TypeVar("Placed")
AXES = ("data", "fsdp", "expert", "context", "tensor")
ROWS = PartitionSpec(("data", "fsdp", "expert"))  # of a batch
TOKENS = PartitionSpec(*ROWS, "context")  # of activations: each row's positions too

# First match wins; a dimension that its axes do not divide stays whole.
RULES = (
    (r"score/embedding$", PartitionSpec()),  # one row: not worth gathering
    (r"embedding$", PartitionSpec("tensor", "fsdp")),
    # But for `expert`, every device has a part of every expert. A router is too small
    # to be gathered; what else there is beside experts, devices of `expert` copy.
    (r"experts/(gate|up)/kernel$", PartitionSpec(None, "expert", "fsdp", "tensor")),
    (r"experts/down/kernel$", PartitionSpec(None, "expert", "tensor", "fsdp")),
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
    expert: int = 1,
    context: int = 1,
    *,
    devices: Devices | None = None,
) -> Mesh:
    """A mesh over all devices.

    Args:
      data: copies of the model that see different rows; slices share no copy.
      fsdp: devices that share one copy's parameters and see different rows.
      tensor: devices that share each matrix product.
      expert: devices that share a copy's experts, each with whole ones, and see
        different rows.
      context: devices that share each row, each with a part of its positions.
      One of them may be -1: what is left of the devices.
      devices: others than those that are there.

    Raises:
      ValueError: if the product is not the number of devices, or slices do not divide
        `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, expert, context, num_devices=len(devices))
    placed = arrange([sizes[name] for name in AXES], devices)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(
    data: int,
    fsdp: int,
    tensor: int,
    expert: int,
    context: int = 1,
    *,
    num_devices: int,
) -> dict[str, int]:
    """The sizes of `make_mesh`'s axes by their names, none of them -1."""
    given = (data, fsdp, expert, context, tensor)
    sizes: dict[str, int] = dict(zip(AXES, given, strict=True))
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) == 1:
        known = max(1, -prod(sizes.values()))
        sizes[unknown[0]] = max(1, num_devices // known)
    if min(sizes.values()) < 1 or prod(sizes.values()) != num_devices:
        told = ", ".join(
            f"{name}={size}" for name, size in zip(AXES, given, strict=True)
        )
        raise ValueError(
            f"The mesh {told} does not fit {num_devices} devices; their product must "
            "be that number."
        )
    return sizes


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


def put_everywhere(tree: Any, shardings: Any) -> Any:
    """Puts arrays that every process has whole onto devices of all of them.

    Not device_put: between processes it would wait for the devices, to compare what
    each of them was given.
    """

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(put, tree, shardings)


class Placement(NamedTuple):
    """How rows reach the devices."""

    put: Callable[[Any], Any]  # host arrays, rows first, to sharded ones
    put_own: Callable[[Any], Any]  # the same, of arrays of `own_rows` alone
    # Of so many rows, those that are on devices of this process.
    own_rows: Callable[[int], np.ndarray]
    num_shards: int  # ways in which rows are divided; their number is a multiple
    mesh: Mesh


def make_placement(mesh: Mesh) -> Placement:
    """Rows over all devices of a mesh that see different ones."""
    sharding, num_shards = rows_sharding(mesh), num_row_shards(mesh)
    # The shards that this process has; any of them may be on several devices.
    indices = sharding.addressable_devices_indices_map((num_shards,)).values()
    own = sorted({index[0].start or 0 for index in indices if index is not None})

    def own_rows(num_rows: int) -> np.ndarray:
        return np.arange(num_rows).reshape(num_shards, -1)[own].reshape(-1)

    def put(rows: Any) -> Any:
        return put_everywhere(rows, jax.tree.map(lambda _: sharding, rows))

    def put_own(rows: Any) -> Any:
        def place(array: np.ndarray) -> jax.Array:
            parts = dict(zip(own, np.split(array, len(own)), strict=True))
            num_rows = len(array) * num_shards // len(own)

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # it would be for a device of another process
                first = index[0].start or 0
                return parts[first * num_shards // num_rows]

            shape = (num_rows, *array.shape[1:])
            return jax.make_array_from_callback(shape, sharding, part)

        return jax.tree.map(place, rows)

    return Placement(put, put_own, own_rows, num_shards, mesh)


def put_ahead(
    batches: Iterable[Batch], put: Callable[[Batch], Placed]
) -> Iterator[tuple[Batch, Placed]]:
    """Each batch on the host and on the devices, where the next one is on its way.

    Args:
      batches: rows on the host.
      put: sends them off to the devices, and does not wait for their arrival.
    """
    waiting: list[tuple[Batch, Placed]] = []
    for batch in batches:
        waiting.append((batch, put(batch)))
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many ways the rows of a batch are divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]


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


def make_look_up(mesh: Mesh) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Makes ``(table, tokens) -> table[tokens]`` for a table whose width is divided.

    Each device of ``fsdp`` looks up the tokens of all of them in its part of the width;
    then they exchange. Left alone, the compiler gathers the whole table on meshes with
    copies, and adds up the whole of its gradient.
    """
    copies = tuple(axis for axis in ROWS[0] if axis != "fsdp")

    def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
        if table.shape[1] % mesh.shape["fsdp"]:
            return table[tokens]  # whole on every device, see `_fit`
        together = NamedSharding(mesh, PartitionSpec(copies))
        tokens = jax.lax.with_sharding_constraint(tokens, together)
        part = _positions(mesh, tokens.shape[1])
        by_width = NamedSharding(mesh, PartitionSpec(copies, part, "fsdp"))
        return jax.lax.with_sharding_constraint(table[tokens], by_width)

    return look_up


def make_constrain(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Pins hidden states to the sharding of their rows and positions.

    Pinned once, in the layer scan, the compiler does not move them between layers.
    """

    def constrain(hidden: jax.Array) -> jax.Array:
        spec = PartitionSpec(*ROWS, _positions(mesh, hidden.shape[1]))
        return jax.lax.with_sharding_constraint(hidden, NamedSharding(mesh, spec))

    return constrain


def _positions(mesh: Mesh, length: int) -> str | None:
    """The axis of positions; those of a cache's one token, say, are on every device."""
    return None if length % mesh.shape["context"] else "context"
