"""Rotary position embedding: frequencies, their scaling kinds, and the rotation.

The frequencies of most kinds are a function of the config alone. Those of two, dynamic
and longrope, depend on a length too. `transformers` takes the longest sequence of a
batch, so that a sequence's numbers depend on what else its batch holds. Here it is
given token by token: that of the token's own example. This file knows no layers and no
files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Positions divided by a factor."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's stretching of the slow rotary frequencies, as in `transformers`."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int  # positions that the model was pre-trained on


@dataclass(frozen=True, kw_only=True)
class YarnRope:
    """YaRN: slow frequencies stretched, fast ones kept, a ramp between by dimension.

    References:
      Peng et al., 2023, arXiv:2309.00071, section 3.2; `transformers`, type "yarn".
    """

    factor: float
    original_length: int
    attention_factor: float  # multiplies queries and keys
    fast_turns: float = 32.0  # dimensions that turn more often than this are kept
    slow_turns: float = 1.0  # those that turn less often are stretched whole
    truncate: bool = True  # the ramp begins and ends at whole dimensions


@dataclass(frozen=True, kw_only=True)
class DynamicRope:
    """A base that grows with a sequence's length, once that exceeds the original one.

    References:
      `transformers`, type "dynamic": NTK-aware scaling.
    """

    factor: float
    original_length: int


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """Each frequency divided by a factor of its own, long sequences by another.

    References:
      Ding et al., 2024, arXiv:2402.13753; `transformers`, type "longrope".
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]  # of sequences that exceed the original length
    original_length: int
    attention_factor: float  # multiplies queries and keys, whatever the length


Scaling = LinearRope | Llama3Rope | YarnRope | DynamicRope | LongRope


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary embedding."""

    theta: float = 10_000.0
    scaling: Scaling | None = None

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies are known only with the length of a sequence."""
        return isinstance(self.scaling, DynamicRope | LongRope)


def rotary_frequencies(rope: Rope, dimension: int) -> Float[np.ndarray, " half"]:
    """Angle per position of each pair of dimensions, in radians.

    Where it depends on a sequence's length too, this is the unscaled one.

    References:
      Su et al., RoFormer, 2021, arXiv:2104.09864, section 3.2.2; for the scaling,
      `transformers.modeling_rope_utils`.
    """
    exponents = np.arange(0, dimension, 2) / dimension
    frequencies = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if isinstance(scaling, LinearRope):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, Llama3Rope | YarnRope):
        if isinstance(scaling, Llama3Rope):
            kept = _kept_by_turns(scaling, frequencies)
        else:
            kept = _kept_by_dimension(scaling, rope.theta, dimension)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def _kept_by_turns(scaling: Llama3Rope, frequencies: np.ndarray) -> np.ndarray:
    """0 where a pair turns too seldom to have been seen whole, 1 where often enough."""
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def _kept_by_dimension(scaling: YarnRope, theta: float, dimension: int) -> np.ndarray:
    """1 before the pair that turns `fast_turns` times, 0 after that of `slow_turns`."""

    def pair_of(turns: float) -> float:
        length = scaling.original_length / (turns * 2 * math.pi)
        return dimension * math.log(length) / (2 * math.log(theta))

    low, high = pair_of(scaling.fast_turns), pair_of(scaling.slow_turns)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimension - 1)
    width = high - low or 0.001  # as transformers: no division by zero
    return 1 - np.clip((np.arange(dimension // 2) - low) / width, 0.0, 1.0)


def _stretch(
    scaling: DynamicRope | LongRope,
    dimension: int,
    sequence_length: Int[Array, "rows length"],
) -> Float[Array, "rows length half"]:
    """What a token's frequencies are divided by, from the length of its sequence."""
    original = scaling.original_length
    if isinstance(scaling, LongRope):
        factors = (scaling.long_factors, scaling.short_factors)
        long, short = (np.array(numbers, np.float32) for numbers in factors)
        return jnp.where(sequence_length[..., None] > original, long, short)
    excess = jnp.maximum(sequence_length - original, 0).astype(jnp.float32)
    growth = 1 + scaling.factor * excess / original  # of the base, but for the power
    powers = np.arange(0, dimension, 2) / (dimension - 2)
    return growth[..., None] ** powers.astype(np.float32)


def rotary_tables(
    rope: Rope | None,
    dimension: int,
    position: Int[Array, "rows length"],
    sequence_length: Int[Array, "rows length"] | None = None,
) -> tuple[Float[Array, "rows length half"], Float[Array, "rows length half"]]:
    """Cosines and sines of every position; without an embedding, those of no angle.

    Args:
      rope: the embedding; None: there is none.
      dimension: how many of a head's dimensions turn.
      position: of each token in its own sequence.
      sequence_length: tokens of the longest sequence of each token's example. Read
        only where the embedding depends on it.
    """
    frequencies = np.zeros(dimension // 2, np.float32)
    if rope is not None:
        frequencies = rotary_frequencies(rope, dimension)
        if isinstance(rope.scaling, DynamicRope | LongRope):
            assert sequence_length is not None
            stretch = _stretch(rope.scaling, dimension, sequence_length)
            frequencies = frequencies / stretch
    angle = position[..., None].astype(jnp.float32) * frequencies
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    if rope is not None and isinstance(rope.scaling, YarnRope | LongRope):
        factor = rope.scaling.attention_factor
        cosine, sine = cosine * factor, sine * factor
    return cosine, sine


def make_rotation(
    cosine: Float[Array, "rows length half"],
    sine: Float[Array, "rows length half"],
    pairs: Literal["halves", "neighbours"],
) -> Callable[[Array], Array]:
    """The rotary embedding of given angles, as a function of queries or keys.

    Dimensions of a head beyond those that the angles cover pass unturned.
    """
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    turned = 2 * cosine.shape[-1]

    def rotate(heads: Float[Array, "rows length heads dimension"]) -> Array:
        exact = heads[..., :turned].astype(jnp.float32)
        if pairs == "halves":
            first, second = jnp.split(exact, 2, axis=-1)
        else:
            first, second = exact[..., ::2], exact[..., 1::2]
        rotated = (first * cosine - second * sine, second * cosine + first * sine)
        if pairs == "halves":
            whole = jnp.concatenate(rotated, axis=-1)
        else:
            whole = jnp.stack(rotated, axis=-1).reshape(exact.shape)
        whole = whole.astype(heads.dtype)
        if turned == heads.shape[-1]:
            return whole
        return jnp.concatenate([whole, heads[..., turned:]], axis=-1)

    return rotate
