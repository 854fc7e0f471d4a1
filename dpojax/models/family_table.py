"""The families of models: what each reads of its config, and what it never has.

A row says which fields of the decoder a family sets, from which keys, and what
transformers takes where a key is absent. How rows are used is `families.py`'s concern.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpojax.models import weight_names
from dpojax.models.rope_settings import RopeSettings

Settings = Mapping[str, Any]
Fields = dict[str, Any]  # of `DecoderConfig`


class Family(NamedTuple):
    """What distinguishes a family."""

    name: str  # what transformers' classes begin with
    names: Mapping[str, str]  # our paths of parameters to tensors
    fields: Callable[[Settings, RopeSettings], Fields]
    keys: frozenset[str] = frozenset()  # read by `fields`, or inert in this family
    defaults: Mapping[str, Any] = {}  # of absent keys
    only: Mapping[str, tuple[Any, ...]] = {}  # keys, and the values that are allowed
    renamed: Mapping[str, str] = {}  # the family's keys to Llama's
    theta: float = 10_000.0  # of absent rope_theta
    causal_name: str | None = None  # of causal models' class; None: by `name`
    reward_name: str | None = ""  # of reward models; "": as `name`; None: has none
    transposed: bool = True  # kernels are stored [outputs, inputs]
    fused_by_head: bool = False  # in a fused tensor, each head's parts are together


_WINDOW = frozenset({"sliding_window", "layer_types"})


def _windows(settings: Settings, rule: Callable[[int], bool]) -> Fields:
    """Window and which layers have it: as listed or, where nothing is, by a rule."""
    num_layers = settings["num_hidden_layers"]
    types = settings.get("layer_types")
    if types is None:
        windowed = tuple(rule(layer) for layer in range(num_layers))
    else:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != num_layers:
            raise ValueError(
                f"config.json has layer_types {types}; dpojax reads one for each of "
                f"{num_layers} layers, 'full_attention' or 'sliding_attention'."
            )
        windowed = tuple(kind == "sliding_attention" for kind in types)
    switched_on = settings.get("use_sliding_window", True)
    window = settings.get("sliding_window") if switched_on else None
    if window is None and types is not None and any(windowed):
        raise ValueError(
            "config.json has layers with sliding attention but no window; set "
            "sliding_window, and use_sliding_window where the family has it."
        )
    if window is None or not any(windowed):
        return {}
    return {"window": window, "window_layers": None if all(windowed) else windowed}


def _llama(settings: Settings, rope: RopeSettings) -> Fields:
    return {}


def _qwen(settings: Settings, rope: RopeSettings) -> Fields:
    first = settings["max_window_layers"]
    return _windows(settings, lambda layer: layer >= first)


def _qwen2(settings: Settings, rope: RopeSettings) -> Fields:
    return {"qkv_bias": True} | _qwen(settings, rope)


def _qwen3(settings: Settings, rope: RopeSettings) -> Fields:
    return {"query_key_norm": "head"} | _qwen(settings, rope)


_QWEN_KEYS = _WINDOW | {"use_sliding_window", "max_window_layers"}
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}

FAMILIES = {
    "llama": Family("Llama", weight_names.LLAMA, _llama),
    "qwen2": Family("Qwen2", weight_names.LLAMA, _qwen2, _QWEN_KEYS, _QWEN_DEFAULTS),
    "qwen3": Family(
        "Qwen3",
        weight_names.LLAMA,
        _qwen3,
        _QWEN_KEYS,
        _QWEN_DEFAULTS | {"head_dim": 128},
    ),
}
