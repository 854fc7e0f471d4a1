"""Adapters in PEFT's form: adapter_config.json and adapter_model.safetensors.

Where a family fuses projections into one module, ours have an adapter each. In a file
they are one adapter of as many times the rank: one A below the other, B in blocks. This
file knows neither the loop nor how adapters compute.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dpojax.models.adapter_layout import Layer, part_of, whole_of
from dpojax.models.adapter_modules import (
    Module,
    adapted_modules,
    choose_modules,
    modules_of,
    short_name,
)
from dpojax.models.families import family_of
from dpojax.models.functional import Params
from dpojax.models.json_files import read_object, write_object
from dpojax.models.lora import LoraShape
from dpojax.models.weight_files import read_header
from dpojax.processes import gathered, is_first, wait_for_all
from dpojax.whole_files import whole_directory

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KINDS = {
    "a": ".lora_A.weight",
    "b": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
}
# Keys that are read, or say nothing about the numbers; others must be empty.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path",
    "ensure_weight_tying", "fan_in_fan_out", "inference_mode", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "use_dora",
    "use_rslora",
}  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others change the base as they begin.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
}


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters instead of a model."""
    return (directory / _CONFIG).is_file()


def adapter_files(directory: Path) -> list[Path]:
    """The files that decide what adapters compute.

    Raises:
      ValueError: if the weights are missing.
    """
    return [directory / _CONFIG, _find_weights(directory)]


def read_base_name(directory: Path) -> str:
    """The name of the model that adapters belong to.

    Raises:
      ValueError: if the file is damaged or names none.
    """
    name = _read_config(directory).get("base_model_name_or_path")
    if not isinstance(name, str):
        raise ValueError(
            f"{directory / _CONFIG} names no base model (base_model_name_or_path)."
        )
    return name


def has_score(directory: Path) -> bool:
    """Whether adapters come with the head of a reward model."""
    return bool(_read_config(directory).get("modules_to_save"))


def read_shape(directory: Path, base: Params, settings: Mapping[str, Any]) -> LoraShape:
    """Which adapters a directory holds. Their dropout was of their training alone.

    Args:
      directory: where they are.
      base: parameters of the base, or their shapes.
      settings: contents of its ``config.json``.

    Raises:
      ValueError: for adapters of another kind, or of another base.
    """
    config, tensors = _read_config(directory), read_header(_find_weights(directory))
    held = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    modules = [
        module
        for module in modules_of(base, settings)
        if not held.isdisjoint(_PREFIX + name for name in module.names)
    ]
    wrong = held ^ {_PREFIX + name for module in modules for name in module.names}
    if wrong or not held:
        raise ValueError(
            f"{directory} holds no adapters of this base model, or not of every layer: "
            f"{min(wrong, default='any')} is missing or has no place there."
        )
    return _as_shape({part for module in modules for part in module.parts}, config)


def shape_by_targets(
    directory: Path, base: Params, settings: Mapping[str, Any]
) -> LoraShape:
    """The same where there are no weights: by what the config alone says."""
    config = _read_config(directory)
    return _as_shape(choose_modules(config["target_modules"], base, settings), config)


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
    tensors, config = _read_tensors(directory), _read_config(directory)
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
            for name in module.names
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
        for index, name in enumerate(module.names):
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


def write_config(
    directory: Path,
    shape: LoraShape,
    base: Params,
    settings: Mapping[str, Any],
    base_name: str,
) -> None:
    """Writes ``adapter_config.json``; takes what `write_adapters` takes."""
    every = modules_of(base, settings)
    modules = adapted_modules(shape.modules, base, settings)
    names = {short_name(module, modules, every): module for module in modules}
    ranks = {
        name: shape.rank * len(module.parts)
        for name, module in names.items()
        if module.is_fused
    }
    with_score = "score" in base
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if with_score else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": shape.rank,
        "lora_alpha": _plain(shape.alpha),
        "lora_dropout": shape.dropout,
        "use_rslora": shape.scaling == "rslora",
        "use_dora": shape.kind == "dora",
        "target_modules": sorted(names),
        "rank_pattern": ranks,
        "alpha_pattern": {
            name: _plain(shape.scale * shape.divisor(rank))
            for name, rank in ranks.items()
        },
        "modules_to_save": ["classifier", "score"] if with_score else None,
        "fan_in_fan_out": not family_of(settings).transposed,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_object(directory / _CONFIG, config)


def _as_shape(modules: Iterable[str], config: Mapping[str, Any]) -> LoraShape:
    return LoraShape(
        modules=frozenset(modules),
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        kind="dora" if config.get("use_dora") else "lora",
        scaling="rslora" if config.get("use_rslora") else "standard",
    )


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / _CONFIG
    config = read_object(path)
    for key, allowed in _ONLY.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{path} has {key} = {config[key]!r}; dpojax reads {allowed[0]!r}."
            )
    for key, value in config.items():
        if value and key not in _KNOWN | _ONLY.keys():
            raise ValueError(
                f"{path} has {key} = {value!r}, which dpojax does not know and will "
                "not ignore."
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    is_number = isinstance(alpha, int | float) and 0 < alpha < math.inf
    if type(rank) is not int or rank < 1 or not is_number:
        raise ValueError(
            f"{path} has r = {rank!r} and lora_alpha = {alpha!r}; both must be "
            "positive numbers, the first a whole one."
        )
    return config


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
