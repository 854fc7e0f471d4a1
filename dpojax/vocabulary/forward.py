"""The forward pass of one device: sums over the vocabulary, tile after tile.

Like an online softmax: what was summed under a smaller maximum shrinks when a larger
logit comes. This file knows no completions and no losses.

References:
  Milakov and Gimelshein, Online Normalizer Calculation for Softmax, 2018,
  arXiv:1805.02867, algorithm 3.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from dpojax.spread import MatrixShard
from dpojax.vocabulary.tiles import (
    How,
    Operand,
    Places,
    Tile,
    Wanted,
    cut,
    make_places,
    over_tiles,
    product,
)


class TokenStatistics(NamedTuple):
    """Each ``[rows, length]`` float32, 0 where not scored; None where not wanted."""

    log_prob: Array  # of the label, nats
    log_sum_squares: Array | None = None  # log sum_v p(v)^2
    entropy: Array | None = None  # nats
    top1: Array | None = None  # 1 where the label is the most likely token
    kl: Array | None = None  # KL(other || this), nats
    other_log_prob: Array | None = None


class Kept(NamedTuple):
    """What the backward pass needs beside the operands, by position."""

    normaliser: Array | None  # log of the softmax's sum
    other_normaliser: Array | None
    slope: Array | None  # gradient of the log-probability by the hidden state


class _Stream(NamedTuple):
    """Sums over the tokens seen so far, ``e = exp(z - maximum)``; each ``[chunk]``."""

    maximum: Array
    total: Array  # sum of e
    label: Array  # the label's logit
    squares: Array | None  # sum of e^2
    weighted: Array | None  # sum of e z
    best: Array | None  # the token of the maximum
    pull: Array | None  # [chunk, width]: sum of e dz/dh
    label_pull: Array | None  # [chunk, width]: the label's dz/dh


def forward(
    how: How,
    shards: tuple[MatrixShard, ...],
    keeps_slope: bool,
    this: Operand,
    other: Operand | None,
    labels: Array,
    scored: Array,
) -> tuple[TokenStatistics, Kept]:
    """Statistics of a device's rows, and what its backward pass needs."""
    places = make_places(scored, how.chunk_size)
    operands = (this,) if other is None else (this, other)
    hidden = [places.split(operand.hidden) for operand in operands]
    targets = places.split(labels)
    wanted = how.wanted
    starts = [_start(targets, wanted, this.hidden if keeps_slope else None)]
    if other is not None:
        starts.append(_start(targets, frozenset(), None))
    distance = jnp.zeros(targets.shape) if "kl" in wanted else None

    def tile_step(carry: Any, start: int | Array, size: int) -> Any:
        tiles = [
            cut(operand, shard, start, size)
            for operand, shard in zip(operands, shards, strict=True)
        ]

        def chunk_step(index: Array, carry: Any) -> Any:
            streams, distance = carry
            logits = [t.logits(h[index]) for t, h in zip(tiles, hidden, strict=True)]
            advanced = [
                _advance(stream, tile, values, rows[index], targets[index])
                for stream, tile, values, rows in zip(
                    streams, tiles, logits, hidden, strict=True
                )
            ]
            if distance is not None:
                weight = jnp.exp(logits[1] - advanced[1].maximum[:, None])
                lost = jnp.exp(streams[1].maximum - advanced[1].maximum)
                apart = jnp.sum(weight * (logits[1] - logits[0]), axis=-1)
                distance = distance * lost + apart
            return advanced, distance

        return places.each(chunk_step, carry)

    streams, distance = over_tiles(
        tile_step, len(this.matrix), how.tile, (starts, distance)
    )
    if distance is not None:
        top = shards[1].max_vocabulary(streams[1].maximum)
        distance = shards[1].sum_vocabulary(
            distance * jnp.exp(streams[1].maximum - top)
        )
    streams = [_whole(s, shard) for s, shard in zip(streams, shards, strict=True)]
    return _conclude(places, streams, distance, labels)


def _start(labels: Array, wanted: frozenset[Wanted], hidden: Array | None) -> _Stream:
    zeros = jnp.zeros(labels.shape)
    pull = None if hidden is None else jnp.zeros((*labels.shape, hidden.shape[-1]))
    return _Stream(
        jnp.full(labels.shape, -jnp.inf),
        zeros,
        zeros,
        zeros if "log_sum_squares" in wanted else None,
        zeros if "entropy" in wanted else None,
        jnp.zeros_like(labels) if "top1" in wanted else None,
        pull,
        pull,
    )


def _advance(
    stream: _Stream, tile: Tile, logits: Array, hidden: Array, labels: Array
) -> _Stream:
    maximum = jnp.maximum(stream.maximum, jnp.max(logits, axis=-1))
    shrink = jnp.exp(stream.maximum - maximum)
    weight = jnp.exp(logits - maximum[:, None])
    label = tile.label_logits(hidden, labels)
    squares, weighted, best = stream.squares, stream.weighted, stream.best
    pull, label_pull = stream.pull, stream.label_pull
    if squares is not None:
        squares = squares * shrink**2 + jnp.sum(jnp.square(weight), axis=-1)
    if weighted is not None:
        weighted = weighted * shrink + jnp.sum(weight * logits, axis=-1)
    if pull is not None and label_pull is not None:
        slope = (weight * tile.steepness(logits)).astype(tile.matrix.dtype)
        pull = pull * shrink[:, None] + product(slope, tile.matrix, (1, 0))
        label_pull += tile.rows(labels) * tile.steepness(label)[:, None]
    if best is not None:
        here = tile.first + jnp.argmax(logits, axis=-1).astype(best.dtype)
        best = jnp.where(maximum > stream.maximum, here, best)
    total = stream.total * shrink + jnp.sum(weight, axis=-1)
    label = stream.label + label
    return _Stream(maximum, total, label, squares, weighted, best, pull, label_pull)


def _whole(stream: _Stream, shard: MatrixShard) -> _Stream:
    """Sums over the whole vocabulary, where devices share it."""
    maximum = shard.max_vocabulary(stream.maximum)
    shrink = jnp.exp(stream.maximum - maximum)

    def total(value: Array | None, factor: Array | float) -> Array | None:
        return None if value is None else shard.sum_vocabulary(value * factor)

    best, pull = stream.best, stream.pull
    if best is not None:
        best = shard.max_vocabulary(jnp.where(shrink == 1, best, -1))
    return stream._replace(
        maximum=maximum,
        total=total(stream.total, shrink),
        label=total(stream.label, 1.0),
        squares=total(stream.squares, shrink**2),
        weighted=total(stream.weighted, shrink),
        best=best,
        pull=total(pull, shrink[..., None]),
        label_pull=total(stream.label_pull, 1.0),
    )


def _conclude(
    places: Places,
    streams: list[_Stream],
    distance: Array | None,
    labels: Array,
) -> tuple[TokenStatistics, Kept]:
    this, other = streams[0], streams[1] if len(streams) == 2 else None
    normaliser = this.maximum + jnp.log(this.total)
    found = TokenStatistics(log_prob=places.join(this.label - normaliser))
    kept = Kept(places.join(normaliser), None, None)
    if this.squares is not None:
        log_squares = jnp.log(this.squares) + 2 * (this.maximum - normaliser)
        found = found._replace(log_sum_squares=places.join(log_squares))
    if this.weighted is not None:
        entropy = normaliser - this.weighted / this.total
        found = found._replace(entropy=places.join(entropy))
    if this.best is not None:
        hit = this.best == places.split(labels)
        found = found._replace(top1=places.join(hit.astype(jnp.float32)))
    if this.pull is not None and this.label_pull is not None:
        slope = this.label_pull - this.pull / this.total[..., None]
        kept = kept._replace(slope=places.join(slope))
    if other is not None:
        its_normaliser = other.maximum + jnp.log(other.total)
        its_log_prob = places.join(other.label - its_normaliser)
        found = found._replace(other_log_prob=its_log_prob)
        kept = kept._replace(other_normaliser=places.join(its_normaliser))
        if distance is not None:
            kl = distance / other.total - its_normaliser + normaliser
            found = found._replace(kl=places.join(kl))
    return found, kept
