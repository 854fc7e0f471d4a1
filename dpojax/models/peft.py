"""Adapters in PEFT's form: adapter_config.json and adapter_model.safetensors.

Where a family fuses projections into one module, ours have an adapter each. In a file
they are one adapter of as many times the rank: one A below the other, B in blocks. This
file knows neither the loop nor how adapters compute.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dpojax.models.adapter_config import (
    CONFIG,
    as_shape,
    read_config,
    write_config,
)
from dpojax.models.adapter_layout import Layer, part_of, whole_of
from dpojax.models.adapter_modules import Module, adapted_modules, modules_of
from dpojax.models.functional import Params
from dpojax.models.lora import LoraShape
from dpojax.models.weight_files import read_header
from dpojax.processes import gathered, is_first, wait_for_all
from dpojax.whole_files import whole_directory

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KINDS = {
    "a": ".lora_A.weight",
    "b": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
}


def adapter_files(directory: Path) -> list[Path]:
    """The files that decide what adapters compute.

    Raises:
      ValueError: if the weights are missing.
    """
    return [directory / CONFIG, _find_weights(directory)]


def read_shape(directory: Path, base: Params, settings: Mapping[str, Any]) -> LoraShape:
    """Which adapters a directory holds. Their dropout was of their training alone.

    Args:
      directory: where they are.
      base: parameters of the base, or their shapes.
      settings: contents of its ``config.json``.

    Raises:
      ValueError: for adapters of another kind, or of another base.
    """
    tensors = read_header(_find_weights(directory))
    held = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    modules = [
        module
        for module in modules_of(base, settings)
        if not held.isdisjoint(_PREFIX + name for name in module.names)
    ]
    parts = {part for module in modules for part in module.parts}
    shape = as_shape(directory, base, parts)
    wanted = {
        _PREFIX + name for module in modules for name in _upper_names(module, shape)
    }
    if held != wanted or not held:
        raise ValueError(
            f"{directory} holds no adapters of this base model, or not of every layer: "
            f"{min(held ^ wanted, default='any')} is missing or has no place there."
        )
    return shape


def read_adapters(
    directory: Path,
    shape: LoraShape,
    like: Params,
    base: Params,
    settings: Mapping[str, Any],
) -> Params:
    """Reads adapters onto the host.

    Args:
      directory: where they are.
      shape: what `read_shape` says of it.
      like: nested dicts of the adapters' shapes.
      base: parameters of the base, or their shapes.
      settings: contents of its ``config.json``.

    Returns:
      Nested dicts like `like`, float32.

    Raises:
      ValueError: if a tensor is missing, left over, of another shape, or not finite.
    """
    tensors, config = _read_tensors(directory), read_config(directory)
    found: dict[str, np.ndarray] = {}
    if "score" in like:
        found["score/embedding"] = _take(tensors, _PREFIX + "score.weight", directory)
    kinds = _KINDS if shape.kind == "dora" else {"a": _KINDS["a"], "b": _KINDS["b"]}
    for module in adapted_modules(shape.modules, base, settings):
        layers: list[Layer] = [
            {
                kind: _take(tensors, _PREFIX + name + end, directory)
                for kind, end in kinds.items()
            }
            for name in _upper_names(module, shape)
        ]
        _check_scale(module, layers[0]["a"].shape[0], shape, config, directory)
        for path in module.parts:
            parts = [part_of(layer, module, path, shape.rank) for layer in layers]
            for kind in kinds:
                stacked = np.stack([part[kind] for part in parts])
                found[f"blocks/{path}/lora/{kind}"] = stacked
    if tensors:
        raise ValueError(
            f"{directory / _WEIGHTS} has a tensor {min(tensors)}, which has no place."
        )

    def checked(path: tuple, wanted: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if found[name].shape != wanted.shape:
            raise ValueError(
                f"{directory / _WEIGHTS} holds adapters of another base: {name} has "
                f"shape {found[name].shape}, and this one asks for {wanted.shape}."
            )
        return found[name].astype(np.float32)

    return jax.tree.map_with_path(checked, like)


def write_adapters(
    directory: Path,
    adapters: Params,
    shape: LoraShape,
    base: Params,
    settings: Mapping[str, Any],
    base_name: str,
    write_rest: Callable[[Path], object],
) -> None:
    """Writes a directory that PEFT loads; it appears by rename.

    Every process must call it, since each holds some of the values; one writes.

    Args:
      directory: where; replaced if it exists.
      adapters: nested dicts of arrays.
      shape: what they are.
      base: parameters of the base, or their shapes.
      settings: contents of its ``config.json``.
      base_name: by which the base is found again.
      write_rest: writes the tokenizer and what else there is into a given directory.
    """
    host = jax.tree.map(gathered, adapters)
    tensors: dict[str, np.ndarray] = {}
    for module in adapted_modules(shape.modules, base, settings):
        for index, name in enumerate(_upper_names(module, shape)):
            for kind, value in whole_of(host, module, index).items():
                tensors[_PREFIX + name + _KINDS[kind]] = np.ascontiguousarray(value)
    if "score" in host:
        tensors[_PREFIX + "score.weight"] = host["score"]["embedding"]
    if is_first():
        with whole_directory(directory) as unfinished:
            save_file(tensors, unfinished / _WEIGHTS, metadata={"format": "pt"})
            write_config(unfinished, shape, base, settings, base_name)
            write_rest(unfinished)
    wait_for_all(f"wrote {directory}")  # nobody reads before the directory is there


def _upper_names(module: Module, shape: LoraShape) -> list[str]:
    """Those of the layers that have adapters."""
    return module.names[shape.trunk(len(module.names)) :]


def _find_weights(directory: Path) -> Path:
    path = directory / _WEIGHTS
    if not path.is_file():
        raise ValueError(
            f"{directory} has no {_WEIGHTS}; other formats of weights are not read."
        )
    return path


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    path = _find_weights(directory)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for name, values in tensors.items():
        if not np.isfinite(values.astype(np.float32)).all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite.")
    return tensors


def _take(tensors: dict[str, np.ndarray], name: str, directory: Path) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"{directory / _WEIGHTS} lacks the tensor {name}.")
    return tensors.pop(name)


def _check_scale(
    module: Module,
    rank: int,
    shape: LoraShape,
    config: Mapping[str, Any],
    directory: Path,
) -> None:
    """Refuses modules whose rank or scale is another than the other ones'."""
    patterns = config.get("alpha_pattern") or {}
    alphas = [
        alpha
        for pattern, alpha in patterns.items()
        if re.match(rf"(.*\.)?({pattern})$", module.names[0])
    ]
    scale = (alphas[0] if alphas else shape.alpha) / shape.divisor(rank)
    ranks = {shape.rank, shape.rank * len(module.parts)}
    if rank not in ranks or not math.isclose(scale, shape.scale, rel_tol=1e-6):
        raise ValueError(
            f"{directory} gives {module.names[0]} rank {rank} and scale {scale:g}; "
            f"dpojax reads adapters of one rank, here {shape.rank}, and one scale, "
            f"{shape.scale:g}."
        )
