"""The backward pass of one device: logits again, and what they pull, tile after tile.

``d log p(label) / dz = [label] - p`` and ``d KL(q || p) / dz = p - q``. This file knows
no completions and no losses.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpojax.spread import MatrixShard
from dpojax.vocabulary.forward import Kept
from dpojax.vocabulary.tiles import (
    How,
    Operand,
    Tile,
    cut,
    make_places,
    over_tiles,
    product,
)


def backward(
    how: How,
    shards: tuple[MatrixShard, ...],
    this: Operand,
    other: Operand | None,
    labels: Array,
    scored: Array,
    kept: Kept,
    log_prob: Array | None,
    kl: Array | None,
) -> Operand:
    """Gradients by a device's hidden states, matrix and bias."""
    places, shard = make_places(scored, how.chunk_size), shards[0]

    def split(array: Array | None) -> Array | None:
        return None if array is None else places.split(array)

    hidden, targets = places.split(this.hidden), places.split(labels)
    normaliser, by_log_prob = split(kept.normaliser), split(log_prob)
    by_kl, its_normaliser = split(kl), split(kept.other_normaliser)
    its_hidden = None if other is None else places.split(other.hidden)
    assert normaliser is not None

    def slope_of(index: Array, tile: Tile, its_tile: Tile | None) -> Array:
        logits = tile.logits(hidden[index])
        p = jnp.exp(logits - normaliser[index][:, None])
        slope = jnp.zeros_like(p)
        if by_log_prob is not None:
            is_label = tile.is_label(targets[index])
            slope = by_log_prob[index][:, None] * (is_label - p)
        if by_kl is not None:
            assert its_tile is not None and its_hidden is not None
            assert its_normaliser is not None
            its_logits = its_tile.logits(its_hidden[index])
            q = jnp.exp(its_logits - its_normaliser[index][:, None])
            slope += by_kl[index][:, None] * (p - q)
        # Chunks are filled with positions that count nothing.
        is_scored = index * places.chunk + jnp.arange(places.chunk) < places.count
        slope *= tile.steepness(logits)
        return jnp.where(is_scored[:, None], slope, 0.0)

    def tile_step(carry: Any, start: int | Array, size: int) -> Any:
        by_hidden, by_matrix, by_bias = carry
        tile = cut(this, shard, start, size)
        its_tile = None
        if by_kl is not None:
            assert other is not None
            its_tile = cut(other, shards[1], start, size)

        def body(index: Array, carry: Any) -> Any:
            by_hidden, by_tile, by_bias = carry
            slope = slope_of(index, tile, its_tile)
            exact, slope = slope, slope.astype(tile.matrix.dtype)
            if by_hidden is not None:
                by_hidden = by_hidden.at[index].add(product(slope, tile.matrix, (1, 0)))
            by_tile += product(slope, hidden[index], (0, 0))
            if by_bias is not None:
                by_bias += jnp.sum(exact, axis=0)
            return by_hidden, by_tile, by_bias

        zero_bias = None if by_bias is None else jnp.zeros(size)
        by_hidden, by_tile, by_part = jax.lax.fori_loop(
            0,
            places.num_scored_chunks,
            body,
            (by_hidden, jnp.zeros(tile.matrix.shape), zero_bias),
        )
        put = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        by_tile = shard.scatter(by_tile).astype(by_matrix.dtype)
        by_matrix = put(by_matrix, by_tile, start)
        if by_bias is not None:
            by_part = shard.sum_rows(by_part).astype(by_bias.dtype)
            by_bias = put(by_bias, by_part, start)
        return by_hidden, by_matrix, by_bias

    carry = (
        None if kept.slope is not None else jnp.zeros(hidden.shape),
        jnp.zeros_like(this.matrix),
        None if this.bias is None else jnp.zeros_like(this.bias),
    )
    by_hidden, by_matrix, by_bias = over_tiles(
        tile_step, len(this.matrix), how.tile, carry
    )
    if by_hidden is None:
        by_hidden = jnp.zeros_like(this.hidden)
    else:
        by_hidden = places.join(shard.sum_vocabulary(by_hidden))
    cap = None if this.cap is None else jnp.zeros_like(this.cap)
    return Operand(by_hidden.astype(this.hidden.dtype), by_matrix, by_bias, cap)
