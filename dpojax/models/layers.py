"""In what the layers of a decoder differ: windows and rotary embeddings.

Layers are scanned, so that what differs is an array over them. This file knows no
parameters.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dpojax.models.attention import Window
from dpojax.models.rotary import make_rotation, rotary_tables
from dpojax.models.shape import DecoderConfig, layer_ropes, layer_windows

NO_WINDOW = 2**30  # further than any position, so that it hides nothing


class Layer(NamedTuple):
    """What is scanned beside the blocks: in what a layer differs from others."""

    index: Int[Array, "*layers"]
    window: Int[Array, "*layers"] | None  # None: no layer has one
    rope: Int[Array, "*layers"] | None  # of the different ones; None: all are alike

    def window_over(self, position: Array) -> Window | None:
        """The layer's window over keys of these positions."""
        return None if self.window is None else Window(position, self.window)


def stack_layers(config: DecoderConfig) -> Layer:
    """What is scanned beside the blocks of a decoder."""
    windows, ropes = layer_windows(config), layer_ropes(config)
    kinds = list(dict.fromkeys(ropes))
    sizes = [NO_WINDOW if window is None else window for window in windows]
    return Layer(
        jnp.arange(config.num_layers),
        None if set(windows) == {None} else jnp.array(sizes, jnp.int32),
        None if len(kinds) == 1 else jnp.array([kinds.index(rope) for rope in ropes]),
    )


def depends_on_length(config: DecoderConfig) -> bool:
    """Whether a layer's rotary frequencies depend on how long a sequence is."""
    ropes = layer_ropes(config)
    return any(rope is not None and rope.depends_on_length for rope in ropes)


def longest_sequences(
    example: Int[Array, "rows length"],
    position: Int[Array, "rows length"],
    num_examples: int,
) -> Int[Array, "rows length"]:
    """Tokens of the longest sequence of each token's example, whatever its branch.

    So the two completions of a prompt are read with one set of frequencies, and what
    else a row or batch holds does not matter. A row does not hold the last token of a
    sequence, which predicts nothing; it does not count.
    """

    def of_row(example: Array, position: Array) -> Array:
        count = num_examples + 1  # and padding, whose number is 0
        return jax.ops.segment_max(position + 1, example, num_segments=count)[example]

    return jax.vmap(of_row)(example, position)


def make_rotations(
    config: DecoderConfig,
    position: Int[Array, "rows length"],
    longest: Int[Array, "rows length"] | None,
) -> Callable[[Layer], Callable[[Array], Array]]:
    """The rotation of each layer; angles are computed once, outside of the scan."""
    kinds = list(dict.fromkeys(layer_ropes(config)))
    if kinds == [None]:
        return lambda layer: lambda heads: heads
    dimension = config.rotary_dimension or config.head_dimension
    tables = [rotary_tables(rope, dimension, position, longest) for rope in kinds]
    if len(kinds) == 1:
        rotate = make_rotation(*tables[0], config.rotary_pairs)
        return lambda layer: rotate
    cosines, sines = (jnp.stack(table) for table in zip(*tables, strict=True))
    return lambda layer: make_rotation(
        cosines[layer.rope], sines[layer.rope], config.rotary_pairs
    )
