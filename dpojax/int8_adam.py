"""Adam whose moments are kept in eight bits, as an Optax transformation.

Both moments are arrays of codes of the parameters' shapes, so that the parameters'
shardings fit them, and of one scale for each block along the last dimension: its
largest magnitude, of which codes are shares. Shares span orders of magnitude, so codes
are not equally far apart (Dettmers et al. 2022, arXiv:2110.02861):

    mean    code k of 127: (k / 127)^4, with its sign
    square  code k of 255: 10^(-10 (255 - k) / 254), each 9.5 % above the last; 0: 0

A square changes by a thousandth a step, less than codes are apart: rounded to the
nearest it would never move. So moments are rounded up or down at random, with chances
that make the mean of both values the exact one. A square below the least code is
rounded up to it, not to 0, which would make its step large. This file knows no model.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Int8, UInt8

Params = Any
BLOCK = 256  # numbers that share a scale, where the last dimension divides so
DECADES = 10  # of squares


class _Scheme(NamedTuple):
    """Codes and the shares of a scale that they stand for."""

    dtype: Any
    least: int  # code of what is not 0
    share: Callable[[Array], Array]
    code_below: Callable[[Array], Array]  # the largest whose share is not above this


MEAN = _Scheme(
    jnp.int8,
    0,
    lambda code: jnp.square(jnp.square(code / 127)),
    lambda share: jnp.floor(jnp.sqrt(jnp.sqrt(share)) * 127),
)
SQUARE = _Scheme(
    jnp.uint8,
    1,
    lambda code: jnp.where(code > 0, 10 ** ((code - 255) * (DECADES / 254)), 0.0),
    lambda share: jnp.floor(255 + jnp.log10(share) * (254 / DECADES)),
)


class Codes(NamedTuple):
    """Numbers in eight bits."""

    code: Int8[Array, "..."] | UInt8[Array, "..."]
    scale: Float[Array, "..."]  # of each block along the last dimension


class Int8AdamState(NamedTuple):
    """Both moments; every tree has the parameters' structure, for their shardings."""

    count: Int[Array, ""]
    mean: Params
    mean_scale: Params
    square: Params
    square_scale: Params


def scale_by_int8_adam(
    beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, seed: int = 0
) -> optax.GradientTransformation:
    """Adam's rule, its moments between steps in eight bits.

    ``m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon)`` of this step's exact m
    and v, which are rounded afterwards.

    Args:
      beta1: decay of the mean m.
      beta2: decay of the mean square v.
      epsilon: added to the root.
      seed: of the rounding; the state needs no key, the step's number is enough.
    """

    def init(params: Params) -> Int8AdamState:
        means = jax.tree.map(lambda x: _zeros(x, MEAN), params)
        squares = jax.tree.map(lambda x: _zeros(x, SQUARE), params)
        count = jnp.zeros((), jnp.int32)
        return Int8AdamState(count, *_unzip(means), *_unzip(squares))

    def update(
        updates: Params, state: Any, params: Params | None = None
    ) -> tuple[Params, Int8AdamState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        tree, keys = jax.tree.structure(updates), jax.random.key(seed)
        keys = jax.random.split(jax.random.fold_in(keys, count), tree.num_leaves)
        correct1, correct2 = 1 - beta1**count, 1 - beta2**count

        def one(gradient: Array, key: Array, mean: Codes, square: Codes) -> tuple:
            if gradient.ndim > 2:  # layer by layer: floats of one exist at a time
                keys = jax.random.split(key, len(gradient))
                parts = (gradient, keys, mean, square)
                return jax.lax.map(lambda part: one(*part), parts)
            exact = gradient.astype(jnp.float32)
            m = beta1 * decode(mean, MEAN) + (1 - beta1) * exact
            v = beta2 * decode(square, SQUARE) + (1 - beta2) * jnp.square(exact)
            step = m / correct1 / (jnp.sqrt(v / correct2) + epsilon)
            key_m, key_v = jax.random.split(key)
            mean, square = encode(m, MEAN, key_m), encode(v, SQUARE, key_v)
            return step.astype(gradient.dtype), mean, square

        means = _zip(state.mean, state.mean_scale)
        squares = _zip(state.square, state.square_scale)
        keys = jax.tree.unflatten(tree, list(keys))
        found = jax.tree.map(one, updates, keys, means, squares)
        steps, means, squares = jax.tree.transpose(tree, None, found)
        return steps, Int8AdamState(count, *_unzip(means), *_unzip(squares))

    return optax.GradientTransformation(init, update)


def encode(values: Float[Array, "..."], scheme: _Scheme, key: Array) -> Codes:
    """Numbers to codes, rounded at random so that their mean stays.

    Args:
      values: means, or squares.
      scheme: `MEAN` or `SQUARE`.
      key: decides the rounding.
    """
    most, size = jnp.iinfo(scheme.dtype).max, jnp.abs(values)
    scale = jnp.max(_blocks(size), axis=-1)
    share = size / jnp.maximum(_spread(scale, size), jnp.finfo(jnp.float32).tiny)
    below = jnp.clip(
        scheme.code_below(share), jnp.where(size > 0, scheme.least, 0), most
    )
    low, high = scheme.share(below), scheme.share(below + 1)
    up = jax.random.uniform(key, share.shape) < (share - low) / (high - low)
    code = jnp.minimum(below + up, most)
    return Codes((jnp.sign(values) * code).astype(scheme.dtype), scale)


def decode(codes: Codes, scheme: _Scheme) -> Float[Array, "..."]:
    """The numbers that codes stand for, float32."""
    code = codes.code.astype(jnp.float32)
    share = scheme.share(jnp.abs(code))
    return jnp.sign(code) * share * _spread(codes.scale, code)


def _zeros(like: Array, scheme: _Scheme) -> Codes:
    blocks = jax.eval_shape(_blocks, like)
    return Codes(jnp.zeros(like.shape, scheme.dtype), jnp.zeros(blocks.shape[:-1]))


def _block(shape: tuple[int, ...]) -> int:
    """Numbers of a block: a power of 2, so that shards mostly hold whole ones.

    A dimension that none divides, or only one too small to save anything, is one block.
    """
    last = shape[-1] if shape else 1
    block = math.gcd(last, BLOCK)
    return block if block >= 16 else last


def _blocks(values: Array) -> Array:
    """``[..., last]`` to ``[..., blocks, block]``."""
    block = _block(values.shape)
    return values.reshape(*values.shape[:-1], -1, block)


def _spread(scale: Array, like: Array) -> Array:
    """Each block's scale at each of its numbers."""
    return jnp.repeat(scale, _block(like.shape), axis=-1).reshape(like.shape)


def _zip(codes: Params, scales: Params) -> Params:
    return jax.tree.map(Codes, codes, scales)


def _unzip(tree: Params) -> tuple[Params, Params]:
    def part(index: int) -> Params:
        return jax.tree.map(
            lambda pair: pair[index], tree, is_leaf=lambda x: isinstance(x, Codes)
        )

    return part(0), part(1)
