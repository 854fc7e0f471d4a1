"""Rotary settings of a Hugging Face config, in every form that they are written in.

transformers 5 writes ``rope_parameters``, for some families one for each kind of layer;
before, there were ``rope_theta`` and ``rope_scaling``. No key is silently ignored.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpojax.models.rotary import LinearRope, Llama3Rope, Rope, Scaling, YarnRope

KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})


class RopeSettings(NamedTuple):
    """What a config says of rotary positions."""

    whole: Rope  # of layers that see the whole sequence
    window: Rope  # of layers that have a window
    share: float | None  # of a head's dimensions, how many turn; None: not said


def read_rope(
    settings: Mapping[str, Any], theta: float, window_theta: float | None = None
) -> RopeSettings:
    """Reads the rotary settings of a config.

    Args:
      settings: the contents of ``config.json``.
      theta: the base where none is given.
      window_theta: the same for layers with a window; they are unscaled then. None:
        they have the embedding of the others.

    Raises:
      ValueError: for a kind of scaling, or a key of one, that is not known.
    """
    theta = settings.get("rope_theta") or theta
    if window_theta is not None:
        window_theta = settings.get("rope_local_base_freq") or window_theta
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    by_kind = any(isinstance(value, Mapping) for value in given.values())
    if by_kind:
        unknown = given.keys() - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(
                f"config.json has rotary settings of the layer types {sorted(unknown)}."
            )
        whole, share = _read_one(given.get("full_attention") or {}, theta)
        window, _ = _read_one(
            given.get("sliding_attention") or {}, window_theta or theta
        )
        return RopeSettings(whole, window, share)
    whole, share = _read_one(given, theta)
    if window_theta is None:
        return RopeSettings(whole, whole, share)
    return RopeSettings(whole, Rope(theta=float(window_theta)), share)


def _read_one(given: Mapping[str, Any], theta: float) -> tuple[Rope, float | None]:
    rope = dict(given)
    theta = rope.pop("rope_theta", None) or theta
    share = rope.pop("partial_rotary_factor", None)
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope.pop("type", None)
    if kind == "default":
        # Written by transformers where the context was never extended.
        if rope.get("original_max_position_embeddings") is None:
            rope.pop("original_max_position_embeddings", None)
        scaling = None
    elif kind in _KINDS:
        scaling = _KINDS[kind](rope)
    else:
        raise ValueError(
            f"config.json scales rotary positions by {kind!r}; "
            f"supported: 'default', {', '.join(map(repr, _KINDS))}."
        )
    if rope:
        raise ValueError(f"config.json has unknown rotary settings {sorted(rope)}.")
    return Rope(theta=float(theta), scaling=scaling), share


def _linear(rope: dict[str, Any]) -> LinearRope:
    return LinearRope(factor=_number(rope, "factor"))


def _llama3(rope: dict[str, Any]) -> Llama3Rope:
    return Llama3Rope(
        factor=_number(rope, "factor"),
        low_frequency_factor=_number(rope, "low_freq_factor"),
        high_frequency_factor=_number(rope, "high_freq_factor"),
        original_length=_take(rope, "original_max_position_embeddings"),
    )


def _yarn(rope: dict[str, Any]) -> YarnRope:
    factor = _number(rope, "factor")
    scale, scale_all = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    attention_factor = rope.pop("attention_factor", None)
    if attention_factor is None:
        attention_factor = _mscale(factor, 1.0)
        if scale and scale_all:
            attention_factor = _mscale(factor, float(scale)) / _mscale(
                factor, float(scale_all)
            )
    return YarnRope(
        factor=factor,
        original_length=_take(rope, "original_max_position_embeddings"),
        attention_factor=float(attention_factor),
        fast_turns=float(rope.pop("beta_fast", None) or 32),
        slow_turns=float(rope.pop("beta_slow", None) or 1),
        truncate=rope.pop("truncate", True),
    )


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


_KINDS: dict[str, Callable[[dict[str, Any]], Scaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def _number(rope: dict[str, Any], key: str) -> float:
    return float(_take(rope, key))


def _take(rope: dict[str, Any], key: str) -> Any:
    if key not in rope:
        raise ValueError(f"config.json lacks the rotary setting {key}.")
    return rope.pop(key)
