"""Arrays on devices to safetensors files, one file at a time.

The host holds one file's tensors, never all of them. The same arrays give the same
bytes. Names and directories are not this file's concern.
"""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from dpojax.models.functional import Params
from dpojax.models.json_files import write_object
from dpojax.models.weight_files import INDEX
from dpojax.models.weight_places import Place, is_place
from dpojax.processes import gathered, is_first
from dpojax.progress import track

# What the hub's own tools divide by.
MAX_SHARD_SIZE = "5GB"


class _Part(NamedTuple):
    """Values of a tensor, or of some of its outputs: one array's, at an index."""

    array: jax.Array | np.ndarray
    index: tuple[int, ...]
    place: Place


class NewTensor(NamedTuple):
    """A tensor to be written, whose values are still on devices."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: list[_Part]

    @property
    def num_values(self) -> int:
        """How many there are."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size in a file."""
        return self.num_values * self.dtype.itemsize


def as_tensors(params: Params, places: Params) -> dict[str, NewTensor]:
    """The tensors that arrays become, by name; layers follow each other.

    Args:
      params: nested dicts of arrays.
      places: a `Place` for each.
    """
    tensors: dict[str, NewTensor] = {}
    leaves = zip(
        jax.tree.leaves(places, is_leaf=is_place), jax.tree.leaves(params), strict=True
    )
    for place, array in leaves:
        shape = array.shape[place.names.ndim :]
        shape = place.stored_shape(shape[::-1] if place.transposed else shape)
        for index, name in np.ndenumerate(place.names):
            new = tensors.setdefault(name, NewTensor(shape, np.dtype(array.dtype), []))
            new.parts.append(_Part(array, index, place))
    return {name: tensors[name] for name in sorted(tensors, key=_by_number)}


def write_weights(
    directory: Path,
    tensors: Mapping[str, NewTensor],
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes ``model.safetensors`` or, if larger than a shard, shards and their index.

    Every process must call it, since each holds some of the values; one writes.

    Args:
      directory: an existing one.
      tensors: what to write.
      max_shard_size: most bytes of a file, or a text like "5GB"; a tensor that is
        larger has a file of its own.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    num_values = sum(tensor.num_values for tensor in tensors.values())
    with track("Writing weights", total=num_values) as advance:
        for file, names in split.filename_to_tensors.items():
            values = {}
            for name in names:
                gathered_values = _gather(tensors[name])
                if is_first():
                    values[name] = gathered_values
                advance("", tensors[name].num_values)
            if is_first():
                save_file(values, directory / file, metadata={"format": "pt"})
            del values  # before those of the next file
    if split.is_sharded and is_first():
        metadata = {"total_parameters": num_values} | split.metadata
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        write_object(directory / INDEX, index)


def _gather(tensor: NewTensor) -> np.ndarray:
    """A tensor's values on the host, in one piece of memory as a file needs them."""
    whole = np.empty(tensor.shape, tensor.dtype)
    for array, index, place in tensor.parts:
        values = gathered(array[index] if index else array)
        where = ... if place.outputs is None else place.stored_index(place.outputs)
        whole[where] = values.T if place.transposed else values
    return whole


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(int(part) if part.isdigit() else -1, part) for part in parts]
