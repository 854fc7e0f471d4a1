"""Where each parameter stands in the tensors of a file.

Names, transposition, and fusion: several of our arrays may be parts of one tensor, side
by side along its outputs. This file opens no file.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.models.family_table import Family
from dpojax.models.functional import Params


class Place(NamedTuple):
    """The tensors of one array.

    A single one, one for each layer, or one for each expert of each layer: the names
    have the shape of the array's leading dimensions, over which tensors are stacked.
    """

    names: np.ndarray  # of str
    transposed: bool
    outputs_dimension: int  # of the tensor, the dimension that fusion divides
    outputs: np.ndarray | None  # of a fused tensor, which are ours, ascending
    num_outputs: int  # of the whole tensor

    def stored_index(self, outputs: np.ndarray) -> tuple:
        """Picks outputs of a stored tensor."""
        return (slice(None),) * self.outputs_dimension + (outputs,)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor in whose layout our part has the given one."""
        if self.outputs is None:
            return shape
        before = shape[: self.outputs_dimension]
        return (*before, self.num_outputs, *shape[self.outputs_dimension + 1 :])


def is_place(leaf: Any) -> bool:
    """Where a tree of places ends: a `Place` is a tuple, which JAX would enter."""
    return isinstance(leaf, Place)


def as_named(family: Family, tensors: Collection[str]) -> Family:
    """The family, with the names that a file has which was saved from its base model.

    Other classes of transformers hold the base model under a prefix, ``model.`` say;
    saved by itself it has none. GPT-2's own file on the hub is of that kind.

    Args:
      family: with names of models that have a head.
      tensors: names in the file.
    """
    whole = family.names["embedding/embedding"]
    prefix = whole.partition(".")[0] + "."
    if whole in tensors or whole.removeprefix(prefix) not in tensors:
        return family
    names = {ours: name.removeprefix(prefix) for ours, name in family.names.items()}
    return family._replace(names=names)


def as_places(params: Params, family: Family, num_heads: int = 1) -> Params:
    """A `Place` for each array.

    Args:
      params: nested dicts of arrays or their shapes.
      family: whose tensors they are.
      num_heads: in how many groups a tensor is divided that is fused by head.
    """
    arrays = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    sharing: dict[str, list[str]] = {}
    for path in sorted(arrays.keys(), key=list(family.names).index):
        sharing.setdefault(family.names[path], []).append(path)
    groups = num_heads if family.fused_by_head else 1

    def place(path: tuple, leaf: Any) -> Place:
        name = _name(path)
        template = family.names[name]
        transposed = path[-1].key == "kernel" and family.transposed
        sizes = {part: arrays[part].shape[-1] for part in sharing[template]}
        fused = len(sizes) > 1
        return Place(
            _names(template, leaf.shape),
            transposed,
            0 if transposed or path[-1].key != "kernel" else 1,
            _outputs(sizes, name, groups) if fused else None,
            sum(sizes.values()),
        )

    return jax.tree.map_with_path(place, params)


def _names(template: str, shape: tuple[int, ...]) -> np.ndarray:
    """A name for each index of the leading dimensions that the template speaks of."""
    stacked = [key for key in ("layer", "expert") if f"{{{key}}}" in template]
    names = np.empty(shape[: len(stacked)], object)
    for index in np.ndindex(names.shape):
        names[index] = template.format(**dict(zip(stacked, index, strict=True)))
    return names


def _outputs(sizes: dict[str, int], name: str, groups: int) -> np.ndarray:
    """Which outputs of a fused tensor are one part's, within each of its groups."""
    before = 0
    for part, size in sizes.items():
        if part == name:
            break
        before += size // groups
    whole = sum(sizes.values()) // groups
    inside = before + np.arange(sizes[name] // groups)
    return (np.arange(groups)[:, None] * whole + inside).ravel()


def _name(path: tuple) -> str:
    return "/".join(str(entry.key) for entry in path)
