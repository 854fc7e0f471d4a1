"""The mask rule of the row layout, and attention under it. Builds no model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpojax.models.attention import attention, visible

LENGTH = 10
Heads = tuple[jax.Array, jax.Array, jax.Array]
Rows = tuple[jax.Array, jax.Array]
visible_jit = jax.jit(visible, static_argnums=2)


def numbers(largest: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, largest), min_size=LENGTH, max_size=LENGTH)
    return st.lists(row, min_size=2, max_size=2)


@given(numbers(2), numbers(3), st.sampled_from([1, 4, LENGTH]), st.data())
@settings(deadline=None, derandomize=True, database=None, max_examples=60)
def test_visible_equals_a_loop_over_rows_queries_and_keys(
    example: list[list[int]], branch: list[list[int]], num_queries: int, data
):
    offset = data.draw(st.integers(0, LENGTH - num_queries))
    expected = np.zeros((2, num_queries, LENGTH), bool)
    for row in range(2):
        for query in range(num_queries):
            i = offset + query
            for j in range(LENGTH):
                expected[row, query, j] = (
                    j <= i
                    and example[row][j] == example[row][i]
                    and branch[row][j] in (0, branch[row][i])
                )
    found = visible_jit(jnp.array(example), jnp.array(branch), num_queries, offset)
    np.testing.assert_array_equal(found, expected)


def test_visible_by_hand():
    """A prompt of three with completions of two and one, a prompt of one, a padding."""
    example = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]])
    branch = jnp.array([[0, 0, 1, 1, 2, 1, 2, 0]])
    expected = [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xx..x...",
        ".....x..",
        "......x.",
        ".......x",
    ]
    found = np.asarray(visible(example, branch, 8))[0]
    assert ["".join(".x"[int(seen)] for seen in row) for row in found] == expected


def test_every_query_sees_itself():
    example, branch = np.random.default_rng(0).integers(0, 3, (2, 2, LENGTH))
    mask = np.asarray(visible_jit(jnp.array(example), jnp.array(branch), LENGTH, 0))
    assert mask.diagonal(axis1=1, axis2=2).all()


@pytest.fixture(scope="module")
def heads() -> Heads:
    """Queries of four heads, keys and values of two, for three rows."""
    random = np.random.default_rng(1)

    def fill(num_heads: int) -> jax.Array:
        return jnp.asarray(random.normal(size=(3, LENGTH, num_heads, 8)), jnp.float32)

    return fill(4), fill(2), fill(2)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """A shared row of two examples, one example with padding, and only padding."""
    example = jnp.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2], [1] * 6 + [0] * 4, [0] * 10])
    branch = jnp.array([[0, 0, 1, 1, 2, 2, 0, 1, 1, 2], [0] * 6 + [0] * 4, [0] * 10])
    return example, branch


def test_attention_equals_a_float64_softmax_over_the_visible_keys(
    heads: Heads, rows: Rows
):
    found = np.asarray(attention(*heads, *rows))
    query, key, value = (np.asarray(array, np.float64) for array in heads)
    key, value = (np.repeat(array, 2, axis=2) for array in (key, value))
    scores = np.einsum("rqhd,rkhd->rhqk", query, key) / np.sqrt(8)
    mask = np.asarray(visible(*rows, LENGTH))[:, None]
    weights = np.where(mask, np.exp(scores), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("rhqk,rkhd->rqhd", weights, value)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_padding_is_finite_and_so_are_its_gradients(heads: Heads, rows: Rows):
    def total(heads: Heads) -> jax.Array:
        return jnp.sum(attention(*heads, *rows) ** 2)

    assert np.isfinite(attention(*heads, *rows)).all()
    for gradient in jax.grad(total)(heads):
        assert np.isfinite(gradient).all()


def test_grouped_queries_equal_repeated_keys_and_values(heads: Heads, rows: Rows):
    query, key, value = heads
    repeat = partial(jnp.repeat, repeats=2, axis=2)
    np.testing.assert_allclose(
        attention(query, key, value, *rows),
        attention(query, repeat(key), repeat(value), *rows),
        atol=1e-6,
    )


def test_one_query_at_an_offset_equals_its_row_of_the_whole(heads: Heads, rows: Rows):
    query, key, value = heads
    whole = attention(query, key, value, *rows)
    one = jax.jit(
        lambda offset: attention(
            jax.lax.dynamic_slice_in_dim(query, offset, 1, axis=1),
            key,
            value,
            *rows,
            offset,
        )
    )
    for offset in range(LENGTH):
        np.testing.assert_allclose(one(offset)[:, 0], whole[:, offset], atol=1e-6)


def test_bfloat16_heads_give_bfloat16_with_a_float32_softmax(heads: Heads, rows: Rows):
    query, key, value = (array.astype(jnp.bfloat16) for array in heads)
    found = attention(query, key, value, *rows)
    assert found.dtype == jnp.bfloat16
    query, key, value = (array.astype(jnp.float32) for array in (query, key, value))
    expected = attention(query, key, value, *rows)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.02)
