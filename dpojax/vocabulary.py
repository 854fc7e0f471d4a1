"""Statistics of the softmax over a vocabulary, at the scored positions only.

Logits exist for one chunk of positions and one tile of the vocabulary at a time, so
neither tokens nor vocabulary decide how much memory they take. The forward pass keeps
the logarithm of the softmax's sum; the backward pass computes the logits again. Where
the output matrix is frozen, the forward pass keeps the gradient by the hidden state
instead, since what a log-probability's gradient is multiplied by later is one number a
position: that saves the second computation.

Whatever the model computes in, softmax and sums are float32. This file knows no loss,
no completions and no model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpojax.sharding import ROWS
from dpojax.spread import MatrixShard, Spread

# Tokens of a tile: logits of 512 positions are 16 MiB, which caches of servers hold.
TILE = 8192
Wanted = Literal["log_sum_squares", "entropy", "top1", "kl"]


class Operand(NamedTuple):
    """What logits are made of: ``z = hidden matrix^T + bias``, capped where given."""

    hidden: Float[Array, "rows length width"]
    matrix: Float[Array, "vocabulary width"]
    bias: Float[Array, " vocabulary"] | None = None
    cap: float | Float[Array, ""] | None = None  # z becomes cap * tanh(z / cap)


class TokenStatistics(NamedTuple):
    """Each ``[rows, length]`` float32, 0 where not scored; None where not wanted."""

    log_prob: Array  # of the label, nats
    log_sum_squares: Array | None = None  # log sum_v p(v)^2
    entropy: Array | None = None  # nats
    top1: Array | None = None  # 1 where the label is the most likely token
    kl: Array | None = None  # KL(other || this), nats
    other_log_prob: Array | None = None


class How(NamedTuple):
    """What is computed, and in which pieces."""

    wanted: frozenset[Wanted]
    chunk_size: int  # positions of each shard whose logits exist at one time
    spread: Spread
    tile: int = TILE  # tokens of the vocabulary, likewise


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_statistics(
    how: How,
    this: Operand,
    other: Operand | None,
    labels: Int[Array, "rows length"],
    scored: Bool[Array, "rows length"],
) -> TokenStatistics:
    """Statistics of each scored position.

    The gradient is by `this` alone, of its log-probabilities and of ``kl``; everything
    else is a constant.

    Args:
      how: what is wanted beside log-probabilities, positions of a chunk, and the mesh.
      this: hidden states and output matrix.
      other: those of another model, for ``kl`` and ``other_log_prob``.
      labels: the token that each position predicts.
      scored: positions that count.
    """
    return _forward(how, this, other, labels, scored, keeps_slope=False)[0]


class _Kept(NamedTuple):
    """What the backward pass needs beside the operands, by position."""

    normaliser: Array | None  # log of the softmax's sum
    other_normaliser: Array | None
    slope: Array | None  # gradient of the log-probability by the hidden state


def _forward_rule(
    how: How, this: Any, other: Any, labels: Any, scored: Any
) -> tuple[TokenStatistics, tuple]:
    frozen = not (this.matrix.perturbed or (this.bias and this.bias.perturbed))
    values = jax.tree.map(lambda leaf: leaf.value, (this, other, labels, scored))
    found, kept = _forward(how, *values, keeps_slope=frozen and "kl" not in how.wanted)
    return found, (*values, kept)


def _backward_rule(how: How, residuals: tuple, slopes: TokenStatistics) -> tuple:
    this, other, labels, scored, kept = residuals
    log_prob, kl = (
        None if slope is None or isinstance(slope, SymbolicZero) else slope
        for slope in (slopes.log_prob, slopes.kl)
    )
    if log_prob is None and kl is None:
        by_this = jax.tree.map(jnp.zeros_like, this)
    elif kept.slope is not None:
        assert log_prob is not None
        by_hidden = kept.slope * jnp.where(scored, log_prob, 0.0)[..., None]
        by_this = jax.tree.map(jnp.zeros_like, this)
        by_this = by_this._replace(hidden=by_hidden.astype(this.hidden.dtype))
    else:
        by_this = _backward(how, this, other, labels, scored, kept, log_prob, kl)
    return by_this, jax.tree.map(jnp.zeros_like, other), None, None


token_statistics.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


# -- On all devices -------------------------------------------------------------------


def _specs(spread: Spread, operand: Operand | None) -> Any:
    if operand is None:
        return None
    matrix = spread.matrix_spec(operand.matrix)
    bias = None if operand.bias is None else PartitionSpec(matrix[0])
    cap = None if operand.cap is None else PartitionSpec()
    specs: Any = (ROWS, matrix, bias, cap)
    return Operand(*specs)


def _forward(
    how: How,
    this: Operand,
    other: Operand | None,
    labels: Array,
    scored: Array,
    *,
    keeps_slope: bool,
) -> tuple[TokenStatistics, _Kept]:
    spread = how.spread
    shards = tuple(spread.shard(one.matrix) for one in (this, other) if one is not None)
    local = partial(_local_forward, how, shards, keeps_slope)
    in_specs = (_specs(spread, this), _specs(spread, other), ROWS, ROWS)
    return spread.map(local, in_specs, ROWS)(this, other, labels, scored)


def _backward(
    how: How,
    this: Operand,
    other: Operand | None,
    labels: Array,
    scored: Array,
    kept: _Kept,
    log_prob: Array | None,
    kl: Array | None,
) -> Operand:
    spread = how.spread
    shards = tuple(spread.shard(one.matrix) for one in (this, other) if one is not None)
    specs = _specs(spread, this), _specs(spread, other)
    local = partial(_local_backward, how, shards)
    in_specs = (*specs, ROWS, ROWS, ROWS, ROWS, ROWS)
    mapped = spread.map(local, in_specs, specs[0])
    return mapped(this, other, labels, scored, kept, log_prob, kl)


# -- On one device --------------------------------------------------------------------


class _Stream(NamedTuple):
    """Sums over the tokens seen so far, ``e = exp(z - maximum)``; each ``[chunk]``."""

    maximum: Array
    total: Array  # sum of e
    label: Array  # the label's logit
    squares: Array | None  # sum of e^2
    weighted: Array | None  # sum of e z
    pull: Array | None  # [chunk, width]: sum of e dz/dh
    label_pull: Array | None  # [chunk, width]: the label's dz/dh


class _Places(NamedTuple):
    """Scored positions of a device's rows, first and in chunks."""

    order: Int[Array, " positions"]
    count: Int[Array, ""]  # of those that are scored
    num_chunks: int
    chunk: int
    shape: tuple[int, ...]  # of the rows

    def split(self, array: Array) -> Array:
        """``[rows, length, ...]`` to ``[chunks, chunk, ...]``."""
        flat = array.reshape(-1, *array.shape[2:])[self.order]
        surplus = self.num_chunks * self.chunk - len(flat)
        flat = jnp.pad(flat, [(0, surplus), *((0, 0) for _ in flat.shape[1:])])
        return flat.reshape(self.num_chunks, self.chunk, *flat.shape[1:])

    def join(self, chunks: Array) -> Array:
        """The same backwards, 0 where not scored."""
        flat = chunks.reshape(-1, *chunks.shape[2:])[: len(self.order)]
        trailing = (1,) * (flat.ndim - 1)
        is_scored = (jnp.arange(len(flat)) < self.count).reshape(-1, *trailing)
        # argsort of a permutation is its inverse: back to the order of the rows.
        flat = jnp.where(is_scored, flat, 0)[jnp.argsort(self.order)]
        return flat.reshape(*self.shape, *flat.shape[1:])

    def each(self, function: Callable[..., Any], carry: Any) -> Any:
        """Updates the carry, ``[chunks, ...]``, by a function of each chunk of it."""

        def body(index: Array, carry: Any) -> Any:
            part = function(index, jax.tree.map(lambda array: array[index], carry))
            return jax.tree.map(lambda all_, one: all_.at[index].set(one), carry, part)

        return jax.lax.fori_loop(0, -(-self.count // self.chunk), body, carry)


def _places(scored: Array, chunk_size: int) -> _Places:
    flat = scored.reshape(-1)
    chunk = min(chunk_size, len(flat))
    order = jnp.argsort(~flat, stable=True)
    return _Places(order, jnp.sum(flat), -(-len(flat) // chunk), chunk, scored.shape)


def _over_tiles(
    function: Callable[..., Any], num_tokens: int, tile: int, carry: Any
) -> Any:
    """``carry = function(carry, first token, number of tokens)``, tile after tile."""
    tile = min(tile, num_tokens)
    num_whole, rest = divmod(num_tokens, tile)
    if num_whole == 1:
        carry = function(carry, 0, tile)
    else:
        carry = jax.lax.fori_loop(
            0, num_whole, lambda i, carry: function(carry, i * tile, tile), carry
        )
    return function(carry, num_whole * tile, rest) if rest else carry


class _Tile(NamedTuple):
    """A part of the vocabulary, with its whole width."""

    matrix: Array  # [tokens, width], in the hidden states' dtype
    bias: Array | None
    cap: Any
    first: int | Array  # its first token

    def logits(self, hidden: Array) -> Array:
        """Of a chunk; a float32 model gets a true float32 product on every chip."""
        logits = _product(hidden, self.matrix, (1, 1))
        if self.bias is not None:
            logits += self.bias
        return logits if self.cap is None else self.cap * jnp.tanh(logits / self.cap)

    def steepness(self, logits: Array) -> Array | float:
        """What the cap leaves of a gradient by the logits."""
        return 1.0 if self.cap is None else 1 - jnp.square(logits / self.cap)

    def is_label(self, labels: Array) -> Array:
        """``[chunk, tokens]``."""
        return labels[:, None] - self.first == jnp.arange(len(self.matrix))


def _cut(operand: Operand, shard: MatrixShard, start: int | Array, size: int) -> _Tile:
    def part(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, size)

    matrix = shard.gather(part(operand.matrix).astype(operand.hidden.dtype))
    bias = None if operand.bias is None else part(operand.bias).astype(jnp.float32)
    first = shard.first_token(len(operand.matrix)) + start
    return _Tile(matrix, bias, operand.cap, first)


def _product(left: Array, right: Array, contracted: tuple[int, int]) -> Array:
    exact = left.dtype == jnp.float32
    return jax.lax.dot_general(
        left,
        right,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _local_forward(
    how: How,
    shards: tuple[MatrixShard, ...],
    keeps_slope: bool,
    this: Operand,
    other: Operand | None,
    labels: Array,
    scored: Array,
) -> tuple[TokenStatistics, _Kept]:
    places = _places(scored, how.chunk_size)
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
            _cut(operand, shard, start, size)
            for operand, shard in zip(operands, shards, strict=True)
        ]

        def chunk_step(index: Array, carry: Any) -> Any:
            streams, distance = carry
            logits = [t.logits(h[index]) for t, h in zip(tiles, hidden, strict=True)]
            advanced = [
                _advance(stream, tile, values, targets[index])
                for stream, tile, values in zip(streams, tiles, logits, strict=True)
            ]
            if distance is not None:
                weight = jnp.exp(logits[1] - advanced[1].maximum[:, None])
                lost = jnp.exp(streams[1].maximum - advanced[1].maximum)
                apart = jnp.sum(weight * (logits[1] - logits[0]), axis=-1)
                distance = distance * lost + apart
            return advanced, distance

        return places.each(chunk_step, carry)

    streams, distance = _over_tiles(
        tile_step, len(this.matrix), how.tile, (starts, distance)
    )
    if distance is not None:
        top = shards[1].max_vocabulary(streams[1].maximum)
        distance = shards[1].sum_vocabulary(
            distance * jnp.exp(streams[1].maximum - top)
        )
    streams = [_whole(s, shard) for s, shard in zip(streams, shards, strict=True)]
    return _conclude(places, streams, distance, wanted)


def _start(labels: Array, wanted: frozenset[Wanted], hidden: Array | None) -> _Stream:
    zeros = jnp.zeros(labels.shape)
    pull = None if hidden is None else jnp.zeros((*labels.shape, hidden.shape[-1]))
    return _Stream(
        jnp.full(labels.shape, -jnp.inf),
        zeros,
        zeros,
        zeros if "log_sum_squares" in wanted else None,
        zeros if "entropy" in wanted else None,
        pull,
        pull,
    )


def _advance(stream: _Stream, tile: _Tile, logits: Array, labels: Array) -> _Stream:
    maximum = jnp.maximum(stream.maximum, jnp.max(logits, axis=-1))
    shrink = jnp.exp(stream.maximum - maximum)
    weight = jnp.exp(logits - maximum[:, None])
    # A sum over a comparison instead of a gather: the label may be in another tile.
    label = jnp.sum(jnp.where(tile.is_label(labels), logits, 0.0), axis=-1)
    squares, weighted = stream.squares, stream.weighted
    pull, label_pull = stream.pull, stream.label_pull
    if squares is not None:
        squares = squares * shrink**2 + jnp.sum(jnp.square(weight), axis=-1)
    if weighted is not None:
        weighted = weighted * shrink + jnp.sum(weight * logits, axis=-1)
    if pull is not None and label_pull is not None:
        slope = (weight * tile.steepness(logits)).astype(tile.matrix.dtype)
        pull = pull * shrink[:, None] + _product(slope, tile.matrix, (1, 0))
        label_pull += _label_pull(tile, labels, label)
    total = stream.total * shrink + jnp.sum(weight, axis=-1)
    return _Stream(
        maximum, total, stream.label + label, squares, weighted, pull, label_pull
    )


def _label_pull(tile: _Tile, labels: Array, label_logit: Array) -> Array:
    place = labels - tile.first
    inside = (place >= 0) & (place < len(tile.matrix))
    rows = tile.matrix[jnp.clip(place, 0, len(tile.matrix) - 1)].astype(jnp.float32)
    steepness = jnp.broadcast_to(tile.steepness(label_logit), label_logit.shape)
    return jnp.where(inside[:, None], rows * steepness[:, None], 0.0)


def _whole(stream: _Stream, shard: MatrixShard) -> _Stream:
    """Sums over the whole vocabulary, where devices share it."""
    maximum = shard.max_vocabulary(stream.maximum)
    shrink = jnp.exp(stream.maximum - maximum)

    def total(value: Array | None, factor: Array | float) -> Array | None:
        return None if value is None else shard.sum_vocabulary(value * factor)

    pull = stream.pull
    return stream._replace(
        maximum=maximum,
        total=total(stream.total, shrink),
        label=total(stream.label, 1.0),
        squares=total(stream.squares, shrink**2),
        weighted=total(stream.weighted, shrink),
        pull=total(pull, shrink[..., None]),
        label_pull=total(stream.label_pull, 1.0),
    )


def _conclude(
    places: _Places,
    streams: list[_Stream],
    distance: Array | None,
    wanted: frozenset[Wanted],
) -> tuple[TokenStatistics, _Kept]:
    this, other = streams[0], streams[1] if len(streams) == 2 else None
    normaliser = this.maximum + jnp.log(this.total)
    found = TokenStatistics(log_prob=places.join(this.label - normaliser))
    kept = _Kept(places.join(normaliser), None, None)
    if this.squares is not None:
        log_squares = jnp.log(this.squares) + 2 * (this.maximum - normaliser)
        found = found._replace(log_sum_squares=places.join(log_squares))
    if this.weighted is not None:
        entropy = normaliser - this.weighted / this.total
        found = found._replace(entropy=places.join(entropy))
    if "top1" in wanted:
        hit = (this.label >= this.maximum).astype(jnp.float32)
        found = found._replace(top1=places.join(hit))
    if this.pull is not None and this.label_pull is not None:
        slope = this.label_pull - this.pull / this.total[..., None]
        kept = _Kept(None, None, places.join(slope))
    if other is not None:
        its_normaliser = other.maximum + jnp.log(other.total)
        its_log_prob = places.join(other.label - its_normaliser)
        found = found._replace(other_log_prob=its_log_prob)
        kept = kept._replace(other_normaliser=places.join(its_normaliser))
        if distance is not None:
            kl = distance / other.total - its_normaliser + normaliser
            found = found._replace(kl=places.join(kl))
    return found, kept


def _local_backward(
    how: How,
    shards: tuple[MatrixShard, ...],
    this: Operand,
    other: Operand | None,
    labels: Array,
    scored: Array,
    kept: _Kept,
    log_prob: Array | None,
    kl: Array | None,
) -> Operand:
    places, shard = _places(scored, how.chunk_size), shards[0]

    def split(array: Array | None) -> Array | None:
        return None if array is None else places.split(array)

    hidden, targets = places.split(this.hidden), places.split(labels)
    normaliser, by_log_prob = split(kept.normaliser), split(log_prob)
    by_kl, its_normaliser = split(kl), split(kept.other_normaliser)
    its_hidden = None if other is None else places.split(other.hidden)
    assert normaliser is not None

    def slope_of(index: Array, tile: _Tile, its_tile: _Tile | None) -> Array:
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
        tile = _cut(this, shard, start, size)
        its_tile = None
        if by_kl is not None:
            assert other is not None
            its_tile = _cut(other, shards[1], start, size)

        def body(index: Array, carry: Any) -> Any:
            by_hidden, by_tile, by_bias = carry
            slope = slope_of(index, tile, its_tile)
            exact, slope = slope, slope.astype(tile.matrix.dtype)
            by_hidden = by_hidden.at[index].add(_product(slope, tile.matrix, (1, 0)))
            by_tile += _product(slope, hidden[index], (0, 0))
            if by_bias is not None:
                by_bias += jnp.sum(exact, axis=0)
            return by_hidden, by_tile, by_bias

        num_chunks = -(-places.count // places.chunk)
        zero_bias = None if by_bias is None else jnp.zeros(size)
        by_hidden, by_tile, by_part = jax.lax.fori_loop(
            0, num_chunks, body, (by_hidden, jnp.zeros(tile.matrix.shape), zero_bias)
        )
        put = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        by_tile = shard.scatter(by_tile).astype(by_matrix.dtype)
        by_matrix = put(by_matrix, by_tile, start)
        if by_bias is not None:
            by_part = shard.sum_rows(by_part).astype(by_bias.dtype)
            by_bias = put(by_bias, by_part, start)
        return by_hidden, by_matrix, by_bias

    carry = (
        jnp.zeros(hidden.shape),
        jnp.zeros_like(this.matrix),
        None if this.bias is None else jnp.zeros_like(this.bias),
    )
    by_hidden, by_matrix, by_bias = _over_tiles(
        tile_step, len(this.matrix), how.tile, carry
    )
    by_hidden = places.join(shard.sum_vocabulary(by_hidden))
    cap = None if this.cap is None else jnp.zeros_like(this.cap)
    return Operand(by_hidden.astype(this.hidden.dtype), by_matrix, by_bias, cap)
