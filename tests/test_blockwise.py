"""Attention in blocks against that of all scores at once. Builds no model."""

import math
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.data.packing import Example, as_batch
from dpojax.models.attention import Window, attention
from dpojax.models.blockwise import blockwise_attention, choose_block

LENGTH, HEADS, KEY_HEADS, DIMENSION = 45, 4, 2, 8
Arrays = tuple[jax.Array, jax.Array, jax.Array]


def heads(dtype: str = "float32") -> Arrays:
    random = np.random.default_rng(0)

    def fill(num_heads: int) -> jax.Array:
        values = random.normal(size=(3, LENGTH, num_heads, DIMENSION))
        return jnp.asarray(values, dtype)

    return fill(HEADS), fill(KEY_HEADS), fill(KEY_HEADS)


def random_rows(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Example, branch and position of ragged rows, the last of which is empty."""
    random = np.random.default_rng(seed)

    def example() -> Example:
        prompt, *completions = random.integers(1, 8, 1 + random.integers(1, 4))
        prompt, *completions = (np.ones(n, np.int32) for n in (prompt, *completions))
        return Example(prompt, tuple(completions))

    rows = [[example() for _ in range(random.integers(1, 3))] for _ in range(2)]
    batch = as_batch([*rows, []], length=LENGTH, num_slots=2, num_completions=3)
    places = batch.example, batch.branch, batch.position
    first, second, third = map(jnp.asarray, places)
    return first, second, third


def value_and_gradient(attend: Callable[..., jax.Array], arrays: Arrays) -> Arrays:
    def total(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        attended = attend(*arrays)
        exact = attended.astype(jnp.float32)
        weight = jnp.arange(HEADS * DIMENSION).reshape(HEADS, DIMENSION) / 10
        return jnp.sum(jnp.sin(exact * weight)), attended

    gradient, attended = jax.jit(jax.grad(total, has_aux=True))(arrays)
    return attended, *gradient


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("kind", ["plain", "window and cap"])
def test_blocks_give_the_values_and_gradients_of_all_scores_at_once(
    block: int, kind: str
):
    example, branch, position = random_rows(block)
    settings = {}
    if kind != "plain":
        settings = {"window": Window(position, 5), "cap": 2.0, "scale": 0.7}
    rows = {"example": example, "branch": branch, **settings}
    found = value_and_gradient(
        partial(blockwise_attention, block=block, **rows), heads()
    )
    expected = value_and_gradient(partial(attention, **rows), heads())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=3e-6)


def test_bfloat16_gives_what_bfloat16_scores_give():
    example, branch, _ = random_rows(5)
    rows = {"example": example, "branch": branch}
    found = value_and_gradient(partial(blockwise_attention, **rows), heads("bfloat16"))
    expected = value_and_gradient(partial(attention, **rows), heads())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        largest = float(jnp.max(jnp.abs(other)))
        error = jnp.abs(one.astype(jnp.float32) - other)
        assert float(jnp.max(error)) < 0.03 * largest


def test_no_array_is_as_large_as_the_scores_of_one_example():
    """Of value and gradient: two heads of rows of 2,048, in blocks of 256."""
    num_heads, length = 2, 2048
    assert choose_block(length) == 256
    shape = jax.ShapeDtypeStruct((1, length, num_heads, 8), jnp.float32)
    rows = jnp.ones((1, length), jnp.int32)

    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        attended = blockwise_attention(query, key, value, rows, rows)
        return jnp.sum(jnp.square(attended))

    program = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape, shape, shape).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)f32>", program)
    largest = max(math.prod(map(int, shape[:-1].split("x"))) for shape in shapes)
    assert largest == num_heads * 256 * length
