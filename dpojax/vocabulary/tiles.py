"""The pieces: chunks of scored positions, tiles of a vocabulary, and their logits.

This file knows no softmax.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.precision import precision_of
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


class How(NamedTuple):
    """What is computed, and in which pieces."""

    wanted: frozenset[Wanted]
    chunk_size: int  # positions of each shard whose logits exist at one time
    spread: Spread
    tile: int = TILE  # tokens of the vocabulary, likewise


class Places(NamedTuple):
    """Scored positions of a device's rows, first and in chunks."""

    order: Int[Array, " positions"]
    count: Int[Array, ""]  # of those that are scored
    num_chunks: int
    chunk: int
    shape: tuple[int, ...]  # of the rows

    @property
    def num_scored_chunks(self) -> Int[Array, ""]:
        """The first chunks, which hold all that is scored."""
        return -(-self.count // self.chunk)

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

        return jax.lax.fori_loop(0, self.num_scored_chunks, body, carry)


def make_places(scored: Array, chunk_size: int) -> Places:
    """Where the scored positions of rows are."""
    flat = scored.reshape(-1)
    chunk = min(chunk_size, len(flat))
    order = jnp.argsort(~flat, stable=True)
    return Places(order, jnp.sum(flat), -(-len(flat) // chunk), chunk, scored.shape)


def over_tiles(
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


class Tile(NamedTuple):
    """A part of the vocabulary, with its whole width."""

    matrix: Array  # [tokens, width], in the hidden states' dtype
    bias: Array | None
    cap: Any
    first: int | Array  # its first token

    def logits(self, hidden: Array) -> Array:
        """Of hidden states ``[..., width]``, in float32."""
        logits = product(hidden, self.matrix, (hidden.ndim - 1, 1))
        if self.bias is not None:
            logits += self.bias
        return self._capped(logits)

    def steepness(self, logits: Array) -> Array:
        """What the cap leaves of a gradient by the logits."""
        if self.cap is None:
            return jnp.ones_like(logits)
        return 1 - jnp.square(logits / self.cap)

    def rows(self, labels: Array) -> Array:
        """``[chunk, width]``: the labels' rows of the matrix, 0 where not of this tile.

        In float32.
        """
        inside, place = self._places(labels)
        return jnp.where(inside[:, None], self.matrix[place].astype(jnp.float32), 0.0)

    def label_logits(self, hidden: Array, labels: Array) -> Array:
        """``[chunk]``: the labels' logits, 0 where not of this tile.

        From their rows: to find them among all logits, XLA's compiler for CPUs would
        compute these a second time.
        """
        inside, place = self._places(labels)
        logits = jnp.sum(hidden.astype(jnp.float32) * self.rows(labels), axis=-1)
        if self.bias is not None:
            logits += self.bias[place]
        return jnp.where(inside, self._capped(logits), 0.0)

    def is_label(self, labels: Array) -> Array:
        """``[chunk, tokens]``."""
        return labels[:, None] - self.first == jnp.arange(len(self.matrix))

    def _places(self, labels: Array) -> tuple[Array, Array]:
        """Which labels are of this tile, and where in it."""
        place = labels - self.first
        inside = (place >= 0) & (place < len(self.matrix))
        return inside, jnp.clip(place, 0, len(self.matrix) - 1)

    def _capped(self, logits: Array) -> Array:
        return logits if self.cap is None else self.cap * jnp.tanh(logits / self.cap)


def cut(operand: Operand, shard: MatrixShard, start: int | Array, size: int) -> Tile:
    """A tile of a device's part of the vocabulary."""

    def part(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, size)

    matrix = shard.gather(part(operand.matrix).astype(operand.hidden.dtype))
    bias = None if operand.bias is None else part(operand.bias).astype(jnp.float32)
    first = shard.first_token(len(operand.matrix)) + start
    return Tile(matrix, bias, operand.cap, first)


def product(left: Array, right: Array, contracted: tuple[int, int]) -> Array:
    """A product of matrices along one dimension of each, in float32."""
    return jax.lax.dot_general(
        left,
        right,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=precision_of(left.dtype),
        preferred_element_type=jnp.float32,
    )
