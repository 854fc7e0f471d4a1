"""What the values of a ``config.json`` must be: sizes, numbers, switches, lists.

So that a null or a text where a number belongs is refused by its key, before anything
computes with it. Which keys a family has, and what they mean, is not known here.
"""

from collections.abc import Callable, Mapping
from reprlib import Repr
from typing import Any, NamedTuple

from dpojax.precision import LARGEST_FLOAT, SMALLEST_FLOAT

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: object) -> str:
    """A value for a message, however large it is."""
    return _SHORT.repr(value)


def _is_positive(value: Any) -> bool:
    """Whether it is a number that is positive in 32 bits too."""
    return type(value) in (int, float) and SMALLEST_FLOAT <= value <= LARGEST_FLOAT


class _Kind(NamedTuple):
    """What the value of a key must be."""

    words: str
    accepts: Callable[[Any], bool]
    each: "_Kind | None" = None  # of what is in a list


# True is an int to Python, and no size.
_SIZE = _Kind(
    "a positive integer", lambda value: type(value) is int and 0 < value < 2**31
)
# What is made for each layer would otherwise fill the memory.
_LAYERS = _Kind(
    "a positive integer up to 10000",
    lambda value: type(value) is int and 0 < value <= 10_000,
)
_COUNT = _Kind(
    "an integer from 0", lambda value: type(value) is int and 0 <= value < 2**31
)
_NUMBER = _Kind(
    "a positive number",
    _is_positive,
)
_SWITCH = _Kind("true or false", lambda value: isinstance(value, bool))
_NAME = _Kind("a name", lambda value: isinstance(value, str))
_LISTS = {
    each: _Kind("a list", lambda value: isinstance(value, list), each)
    for each in (_NAME, _COUNT, _NUMBER)
}
_OBJECT = _Kind("an object", lambda value: isinstance(value, Mapping))
# Keys as Llama calls them; those of rotary settings are in an object of their own.
_KINDS = (
    dict.fromkeys(
        ("vocab_size", "hidden_size", "num_attention_heads",
         "num_key_value_heads", "head_dim", "intermediate_size",
         "max_position_embeddings", "sliding_window", "sliding_window_pattern",
         "rotary_dim", "no_rope_layer_interval", "num_labels",
         "original_max_position_embeddings", "num_local_experts", "num_experts",
         "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
        _SIZE,
    )
    | dict.fromkeys(
        ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "initializer_range",
         "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
         "embedding_multiplier", "residual_multiplier", "attention_multiplier",
         "logits_scaling", "partial_rotary_factor", "rotary_pct", "factor",
         "low_freq_factor", "high_freq_factor", "attention_factor", "mscale",
         "mscale_all_dim", "beta_fast", "beta_slow", "router_aux_loss_coef"),
        _NUMBER,
    )
    | dict.fromkeys(
        ("tie_word_embeddings", "use_parallel_residual", "use_sliding_window",
         "norm_topk_prob", "output_router_logits", "truncate"),
        _SWITCH,
    )
    | dict.fromkeys(("architectures", "layer_types"), _LISTS[_NAME])
    | dict.fromkeys(("no_rope_layers", "mlp_only_layers"), _LISTS[_COUNT])
    | dict.fromkeys(("short_factor", "long_factor"), _LISTS[_NUMBER])
    | dict.fromkeys(("rope_scaling", "rope_parameters", "id2label"), _OBJECT)
    | {"max_window_layers": _COUNT, "num_hidden_layers": _LAYERS}
    | {"rope_type": _NAME, "type": _NAME}
)  # fmt: skip
# Where null says what absence says.
_NULLABLE = {
    "rope_type", "type",
    "num_key_value_heads", "head_dim", "sliding_window", "rope_theta", "num_labels",
    "rope_local_base_freq", "attn_logit_softcapping", "final_logit_softcapping",
    "architectures", "layer_types", "no_rope_layers", "rope_scaling",
    "rope_parameters", "id2label", "original_max_position_embeddings",
    "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow",
}  # fmt: skip

# Rotary settings; some families have one for each kind of layer.
_NESTED = {"rope_scaling", "rope_parameters", "full_attention", "sliding_attention"}


def check_kinds(
    settings: Mapping[str, Any],
    renamed: Mapping[str, str],
    defaults: Mapping[str, Any],
    inside: str = "",
) -> None:
    """Refuses a value that is not of its key's kind; keys without one may be anything.

    Args:
      settings: contents of the file, or of an object in it.
      renamed: its keys to Llama's.
      defaults: what absent keys are; where that is None, null is allowed.
      inside: the object's key and a dot.

    Raises:
      ValueError: naming the key, its value and what it must be.
    """
    for key, value in settings.items():
        name = renamed.get(key, key)
        if name in _NESTED and isinstance(value, Mapping):
            check_kinds(value, {}, {}, f"{inside}{key}.")
        kind = _KINDS.get(name)
        nullable = defaults.get(name, ...) is None or name in _NULLABLE
        if kind is None or (value is None and nullable):
            continue
        if kind.accepts(value):
            _check_each(value, kind.each, f"{inside}{key}")
            continue
        raise ValueError(
            f"config.json has {inside}{key} = {shown(value)}; it must be {kind.words}"
            f"{' or null' if nullable else ''}."
        )


def _check_each(value: Any, kind: _Kind | None, key: str) -> None:
    if kind is None:
        return
    for one in value:
        if not kind.accepts(one):
            raise ValueError(
                f"config.json has {shown(one)} in {key}; each must be {kind.words}."
            )


def check_division(settings: Mapping[str, Any]) -> None:
    """Refuses heads that do not have equal shares of the width or of the key heads.

    Args:
      settings: contents of the file, its keys being Llama's.

    Raises:
      ValueError: giving both numbers.
    """
    num_heads = settings["num_attention_heads"]
    num_key_heads = settings.get("num_key_value_heads") or num_heads
    if num_heads % num_key_heads:
        raise ValueError(
            f"config.json has {num_heads} query heads and {num_key_heads} key heads; "
            "num_attention_heads must be a multiple of num_key_value_heads."
        )
    if not settings.get("head_dim") and settings["hidden_size"] % num_heads:
        raise ValueError(
            f"config.json has hidden_size = {settings['hidden_size']} and {num_heads} "
            "heads; without head_dim it must be a multiple of num_attention_heads."
        )
