"""Rotary settings of a Hugging Face config, in every form that they are written in.

transformers 5 writes ``rope_parameters``, for some families one for each kind of layer;
before, there were ``rope_theta`` and ``rope_scaling``. No key is silently ignored.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dpojax.models.rotary import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    Rope,
    Scaling,
    YarnRope,
    rotary_frequencies,
)
from dpojax.models.setting_kinds import shown

_LARGEST_HEAD = 2**16
KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})


class RopeSettings(NamedTuple):
    """What a config says of rotary positions."""

    whole: Rope  # of layers that see the whole sequence
    window: Rope  # of layers that have a window
    share: float | None  # of a head's dimensions, how many turn; None: not said


class _Lengths(NamedTuple):
    """Positions that a config states beside its rotary settings."""

    longest: int  # that the model is meant for
    original: int | None  # that it was pre-trained on, where the family states it here


def read_rope(
    settings: Mapping[str, Any],
    theta: float,
    window_theta: float | None = None,
    other_names: Mapping[str, str] | None = None,
) -> RopeSettings:
    """Reads the rotary settings of a config.

    Args:
      settings: the contents of ``config.json``.
      theta: the base where none is given.
      window_theta: the same for layers with a window; they are unscaled then. None:
        they have the embedding of the others.
      other_names: what a family calls kinds of scaling, and their names elsewhere.

    Raises:
      ValueError: for a kind of scaling, or a key of one, that is not known.
    """
    read = partial(_read_one, lengths=_read_lengths(settings), names=other_names or {})
    theta = float(settings.get("rope_theta") or theta)
    if window_theta is not None:
        window_theta = float(settings.get("rope_local_base_freq") or window_theta)
    given = _one_of(settings, "rope_parameters", "rope_scaling")
    by_kind = any(isinstance(value, Mapping) for value in given.values())
    if by_kind:
        unknown = given.keys() - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(
                "config.json has rotary settings of the layer types "
                f"{shown(sorted(unknown))}."
            )
        whole, share = read(given.get("full_attention") or {}, theta)
        window, _ = read(given.get("sliding_attention") or {}, window_theta or theta)
        return RopeSettings(whole, window, share)
    whole, share = read(given, theta)
    if window_theta is None:
        return RopeSettings(whole, whole, share)
    return RopeSettings(whole, Rope(theta=window_theta), share)


def check_rotation(rope: Rope, turning: int | None, of_head: int) -> None:
    """Sees that pairs of a head's dimensions turn, each at a finite frequency.

    Args:
      rope: how they turn.
      turning: how many dimensions do; None: all.
      of_head: how many a head has.

    Raises:
      ValueError: if they cannot.
    """
    dimension = of_head if turning is None else turning
    if dimension % 2 or not 0 < dimension <= of_head <= _LARGEST_HEAD:
        raise ValueError(
            f"config.json turns {dimension} of a head's {of_head} dimensions; the "
            "number must be even, positive and at most all of them, and a head must "
            f"not have more than {_LARGEST_HEAD}."
        )
    _check_factors(rope, dimension)
    try:
        with np.errstate(all="raise", under="ignore"):
            rotary_frequencies(rope, dimension)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(
            f"config.json has rotary settings that give no frequencies ({error}): "
            f"{shown(rope)}."
        ) from error


def _check_factors(rope: Rope, dimension: int) -> None:
    """Sees that longrope has a factor for each pair of dimensions that turns."""
    if not isinstance(rope.scaling, LongRope):
        return
    counts = len(rope.scaling.short_factors), len(rope.scaling.long_factors)
    if counts != (dimension // 2,) * 2:
        raise ValueError(
            f"config.json has {counts[0]} numbers as short_factor and {counts[1]} as "
            f"long_factor; {dimension} dimensions turn, which takes {dimension // 2}."
        )


def _one_of(settings: Mapping[str, Any], new: str, old: str) -> Mapping[str, Any]:
    """What either of two keys holds."""
    one, other = settings.get(new), settings.get(old)
    if one and other and one != other:
        raise ValueError(
            f"config.json has both {new} and {old}, which differ; keep one of them."
        )
    return one or other or {}


def _read_lengths(settings: Mapping[str, Any]) -> _Lengths:
    return _Lengths(
        settings.get("max_position_embeddings", 2048),
        settings.get("original_max_position_embeddings"),
    )


def _read_one(
    given: Mapping[str, Any], theta: float, lengths: _Lengths, names: Mapping[str, str]
) -> tuple[Rope, float | None]:
    rope = dict(given)
    theta = rope.pop("rope_theta", None) or theta
    share = rope.pop("partial_rotary_factor", None)
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    kind = names.get(kind, kind)
    rope.pop("type", None)
    if kind == "default":
        # Written by transformers where the context was never extended.
        if rope.get("original_max_position_embeddings") is None:
            rope.pop("original_max_position_embeddings", None)
        scaling = None
    elif kind in _KINDS:
        scaling = _KINDS[kind](rope, lengths)
    else:
        raise ValueError(
            f"config.json scales rotary positions by {shown(kind)}; "
            f"supported: 'default', {', '.join(map(repr, _KINDS))}."
        )
    if rope:
        raise ValueError(
            f"config.json has unknown rotary settings {shown(sorted(rope))}."
        )
    return Rope(theta=float(theta), scaling=scaling), share and float(share)


def _linear(rope: dict[str, Any], lengths: _Lengths) -> LinearRope:
    return LinearRope(factor=_number(rope, "factor"))


def _dynamic(rope: dict[str, Any], lengths: _Lengths) -> DynamicRope:
    # Of this kind transformers takes the config's own length as the original one.
    return DynamicRope(factor=_number(rope, "factor"), original_length=lengths.longest)


def _llama3(rope: dict[str, Any], lengths: _Lengths) -> Llama3Rope:
    return Llama3Rope(
        factor=_number(rope, "factor"),
        low_frequency_factor=_number(rope, "low_freq_factor"),
        high_frequency_factor=_number(rope, "high_freq_factor"),
        original_length=_original_length(rope, lengths),
    )


def _yarn(rope: dict[str, Any], lengths: _Lengths) -> YarnRope:
    factor, original_length = _extension(rope, lengths)
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
        original_length=original_length,
        attention_factor=float(attention_factor),
        fast_turns=float(rope.pop("beta_fast", None) or 32),
        slow_turns=float(rope.pop("beta_slow", None) or 1),
        truncate=rope.pop("truncate", True),
    )


def _longrope(rope: dict[str, Any], lengths: _Lengths) -> LongRope:
    factor, original_length = _extension(rope, lengths)
    attention_factor = rope.pop("attention_factor", None)
    if attention_factor is None:
        added = math.log(max(factor, 1.0)) / math.log(max(original_length, 2))
        attention_factor = math.sqrt(1 + added)
    return LongRope(
        short_factors=tuple(map(float, _take(rope, "short_factor"))),
        long_factors=tuple(map(float, _take(rope, "long_factor"))),
        original_length=original_length,
        attention_factor=float(attention_factor),
    )


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


_KINDS: dict[str, Callable[[dict[str, Any], _Lengths], Scaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}


def _extension(rope: dict[str, Any], lengths: _Lengths) -> tuple[float, int]:
    """By how much a context was extended, and from what."""
    original_length = _original_length(rope, lengths)
    factor = rope.pop("factor", None)
    if factor is None:
        factor = lengths.longest / original_length
    return float(factor), original_length


def _original_length(rope: dict[str, Any], lengths: _Lengths) -> int:
    given = rope.pop("original_max_position_embeddings", None)
    if lengths.original is None:
        return given or lengths.longest
    if given not in (None, lengths.original):
        raise ValueError(
            f"config.json has original_max_position_embeddings = {given} in its rotary "
            f"settings and {lengths.original} beside them, by default or as given, "
            "which is what transformers reads; give one number in both places."
        )
    return lengths.original


def _number(rope: dict[str, Any], key: str) -> float:
    return float(_take(rope, key))


def _take(rope: dict[str, Any], key: str) -> Any:
    if key not in rope:
        raise ValueError(f"config.json lacks the rotary setting {key}.")
    return rope.pop(key)
