"""Tensors of files onto devices: each process reads its own slices, and no more.

A shard has one buffer on the host, filled tensor by tensor in pieces of a few
megabytes, in the dtype that is asked for. So the host holds, beside arrays that live on
it, one shard. Names and directories are not this file's concern.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from dpojax.models.functional import Params
from dpojax.models.weight_files import Index, StoredTensor
from dpojax.models.weight_places import Place, is_place
from dpojax.progress import track

_PIECE = 2**24  # bytes of a file that are read at once


def read_weights(
    tensors: Mapping[str, StoredTensor],
    places: Params,
    abstract: Params,
    shardings: Params,
    convert: Callable[[str, jax.Array], Any],
) -> Params:
    """Reads arrays onto devices.

    Args:
      tensors: what there is; every name in `places` is among them.
      places: nested dicts of `Place`: of which tensors each array consists.
      abstract: nested dicts of `jax.ShapeDtypeStruct`: what to read, in which dtype.
      shardings: a `jax.sharding.Sharding` for each.
      convert: applied to each path and array as soon as it is read.

    Returns:
      Nested dicts like `abstract` of what `convert` gives.

    Raises:
      ValueError: if a tensor is of another shape, not of floating point numbers, or
        holds NaN or infinity.
    """

    def check(place: Place, wanted: jax.ShapeDtypeStruct) -> None:
        shape = wanted.shape[place.names.ndim :]
        shape = place.stored_shape(shape[::-1] if place.transposed else shape)
        for name in place.names.flat:
            tensors[name].check(shape)

    def read(
        path: tuple, place: Place, wanted: jax.ShapeDtypeStruct, sharding: Sharding
    ) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        made = convert(name, _read_array(tensors, place, wanted, sharding))
        advance("", prod(wanted.shape))
        return made

    jax.tree.map(check, places, abstract, is_leaf=is_place)
    num_values = sum(prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    with track("Reading weights", total=num_values) as advance:
        return jax.tree.map_with_path(
            read, places, abstract, shardings, is_leaf=is_place
        )


def _read_array(
    tensors: Mapping[str, StoredTensor],
    place: Place,
    wanted: jax.ShapeDtypeStruct,
    sharding: Sharding,
) -> jax.Array:
    """One array; what several devices hold is read once."""
    indices = sharding.addressable_devices_indices_map(wanted.shape)
    holders = defaultdict(list)
    for device, index in indices.items():
        assert index is not None  # it would be for a device of another process
        bounds = [
            part.indices(size) for part, size in zip(index, wanted.shape, strict=True)
        ]
        key = tuple((start, stop) for start, stop, _ in bounds)
        holders[key].append(device)
    shards = []
    for key, devices in holders.items():
        index = tuple(slice(*bounds) for bounds in key)
        host = _read_shard(tensors, place, index, wanted.dtype)
        for device in devices:
            where = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            shards.append(jax.device_put(host, where))
        jax.block_until_ready(shards)  # until then, the device's copy needs the host's
    return jax.make_array_from_single_device_arrays(wanted.shape, sharding, shards)


def _read_shard(
    tensors: Mapping[str, StoredTensor], place: Place, index: Index, dtype: np.dtype
) -> np.ndarray:
    host = _empty([part.stop - part.start for part in index], dtype)
    num_stacked = place.names.ndim
    names = np.asarray(place.names[index[:num_stacked]], object)
    for position, name in np.ndenumerate(names):
        _read_tensor(tensors[name], place, index[num_stacked:], host[position])
    return host


def _read_tensor(
    tensor: StoredTensor, place: Place, index: Index, target: np.ndarray
) -> None:
    """Fills `target` with a slice of one tensor, some rows of the file at a time."""
    if place.transposed:
        index, target = index[::-1], target.T
    num_rows = max(1, _PIECE // max(1, tensor.row_bytes))
    for first in range(0, len(target), num_rows):
        piece = target[first : first + num_rows]
        start = index[0].start + first
        rows = slice(start, start + len(piece))
        with np.errstate(over="ignore"):  # what is too large becomes infinity
            piece[...] = _read_outputs(tensor, place, (rows, *index[1:]))
        if not np.isfinite(piece).all():
            raise ValueError(
                f"{tensor.path}: {tensor.name} holds NaN or infinity; the file is "
                "damaged or training had diverged, so give an earlier checkpoint."
            )


def _read_outputs(tensor: StoredTensor, place: Place, index: Index) -> np.ndarray:
    """A slice of one tensor; of a fused one, those of its outputs that are ours."""
    if place.outputs is None:
        return tensor.read(index)
    outputs = place.outputs[index[place.outputs_dimension]]
    first = int(outputs[0])
    stored = list(index)
    stored[place.outputs_dimension] = slice(first, int(outputs[-1]) + 1)
    return tensor.read(tuple(stored))[place.stored_index(outputs - first)]


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """A new array that begins at a multiple of 64 bytes.

    Such a one a CPU device takes over; any other it copies.
    """
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
