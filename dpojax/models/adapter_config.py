"""The settings of adapters in PEFT's form: adapter_config.json, read and written.

What dpojax does not compute is refused, and no key is ignored. This file opens no
weights.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpojax.models.adapter_modules import (
    adapted_modules,
    as_last_layers,
    choose_modules,
    modules_of,
    num_layers_of,
    short_name,
)
from dpojax.models.families import family_of
from dpojax.models.functional import Params
from dpojax.models.json_files import read_object, write_object
from dpojax.models.lora import LoraShape

CONFIG = "adapter_config.json"
# Keys that are read, or say nothing about the numbers; others must be empty.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path",
    "ensure_weight_tying", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha",
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
    return (directory / CONFIG).is_file()


def read_base_name(directory: Path) -> str:
    """The name of the model that adapters belong to.

    Raises:
      ValueError: if the file is damaged or names none.
    """
    name = read_config(directory).get("base_model_name_or_path")
    if not isinstance(name, str):
        raise ValueError(
            f"{directory / CONFIG} names no base model (base_model_name_or_path)."
        )
    return name


def has_score(directory: Path) -> bool:
    """Whether adapters come with the head of a reward model."""
    return bool(read_config(directory).get("modules_to_save"))


def shape_by_targets(
    directory: Path, base: Params, settings: Mapping[str, Any]
) -> LoraShape:
    """Which adapters a directory holds, by what its config alone says."""
    targets = read_config(directory)["target_modules"]
    return as_shape(directory, base, choose_modules(targets, base, settings))


def write_config(
    directory: Path,
    shape: LoraShape,
    base: Params,
    settings: Mapping[str, Any],
    base_name: str,
) -> None:
    """Writes ``adapter_config.json``; takes what `dpojax.models.peft` writes with."""
    every = modules_of(base, settings)
    modules = adapted_modules(shape.modules, base, settings)
    names = {short_name(module, modules, every): module for module in modules}
    ranks = {
        name: shape.rank * len(module.parts)
        for name, module in names.items()
        if module.is_fused
    }
    number = num_layers_of(base)
    upper = [*range(shape.trunk(number), number)]
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
        "layers_to_transform": None if shape.layers is None else upper,
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
    write_object(directory / CONFIG, config)


def as_shape(directory: Path, base: Params, modules: Iterable[str]) -> LoraShape:
    """What a directory's config says of adapters of these projections.

    Args:
      directory: where it is.
      base: parameters of the base, or their shapes.
      modules: our paths in a layer.

    Raises:
      ValueError: for adapters of another kind, or of other layers than the last.
    """
    config = read_config(directory)
    return LoraShape(
        modules=frozenset(modules),
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        kind="dora" if config.get("use_dora") else "lora",
        scaling="rslora" if config.get("use_rslora") else "standard",
        layers=_last_layers(directory, config.get("layers_to_transform"), base),
    )


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _last_layers(directory: Path, chosen: Any, base: Params) -> int | None:
    number = num_layers_of(base)
    if chosen is None or chosen == []:
        return None
    layers = chosen if isinstance(chosen, list) else [chosen]
    last = [*range(number - len(layers), number)]
    if sorted(layers, key=str) != sorted(last, key=str):
        raise ValueError(
            f"{directory / CONFIG} has layers_to_transform = {chosen!r}; dpojax reads "
            "adapters of all layers or of the last ones, and the last of this base is "
            f"{number - 1}."
        )
    return as_last_layers(len(layers), base)


def read_config(directory: Path) -> dict[str, Any]:
    """The config, where nothing in it is ignored.

    Raises:
      ValueError: for what dpojax does not compute.
    """
    path = directory / CONFIG
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
