"""One layer's adapter of a module, as files hold it, and ours of its parts.

A module that is several of our projections side by side has one A in a file, which all
of them share. Ours have one each; written, one stands below the other, and B is zero
but in blocks: the same function, of as many times the rank. This file opens no file.
"""

import jax
import numpy as np

from dpojax.models.adapter_modules import Module
from dpojax.models.functional import Params

# A module's: a ``[rank, inputs]``, b ``[outputs, rank]`` and, of DoRA, magnitude
# ``[outputs]``. A part's: a and b the other way round.
Layer = dict[str, np.ndarray]


def whole_of(host: Params, module: Module, layer: int) -> Layer:
    """A module's arrays in one layer, from the adapters of its parts.

    Args:
      host: the adapters, on the host.
      module: which, and its parts.
      layer: index of the layer.
    """
    parts = [_at(host, path, layer) for path in module.parts]
    if not module.is_fused:
        return {kind: value.T for kind, value in parts[0].items()}
    num_outputs = next(iter(module.parts.values())).num_outputs
    rank = parts[0]["a"].shape[1]
    whole = {
        "a": np.concatenate([part["a"].T for part in parts]),
        "b": np.zeros((num_outputs, rank * len(parts)), np.float32),
        "magnitude": np.zeros(num_outputs, np.float32),
    }
    for index, (part, place) in enumerate(
        zip(parts, module.parts.values(), strict=True)
    ):
        whole["b"][place.outputs, _block(index, rank)] = part["b"].T
        if "magnitude" in part:
            whole["magnitude"][place.outputs] = part["magnitude"]
    return {kind: whole[kind] for kind in parts[0]}


def part_of(whole: Layer, module: Module, path: str, rank: int) -> Layer:
    """A part's arrays in one layer, from those of its module.

    Args:
      whole: the module's.
      module: which.
      path: of the part.
      rank: of the part. The module's is the same, then the part shares its A; or as
        many times more as there are parts, in blocks.

    Raises:
      ValueError: if there should be blocks and are none.
    """
    outputs, a = module.parts[path].outputs, whole["a"]
    b = whole["b"] if outputs is None else whole["b"][outputs]
    if len(a) != rank:
        block = _block(list(module.parts).index(path), rank)
        if np.count_nonzero(b) != np.count_nonzero(b[:, block]):
            raise ValueError(
                f"The adapter of {module.names[0]} has rank {len(a)} instead of {rank} "
                "and is not made of one block for each projection."
            )
        a, b = a[block], b[:, block]
    part = {"a": a.T, "b": b.T}
    if "magnitude" in whole:
        magnitude = whole["magnitude"]
        part["magnitude"] = magnitude if outputs is None else magnitude[outputs]
    return part


def _at(host: Params, path: str, layer: int) -> Layer:
    """The adapter of one of our projections in one layer."""
    projection = host["blocks"]
    for name in path.split("/"):
        projection = projection[name]
    return jax.tree.map(lambda array: array[layer], projection["lora"])


def _block(index: int, rank: int) -> slice:
    return slice(index * rank, (index + 1) * rank)
