"""Log-probabilities and KL from hidden states, against float64 and in little memory.

Builds no model: hidden states and output matrices are random numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.batch import Batch
from dpojax.data.packing import Example, as_batch
from dpojax.log_probs import (
    completion_kl,
    completion_log_probs,
    in_shared_prefix,
    sum_completions,
    token_values,
)
from dpojax.vocabulary.tiles import Wanted

VOCABULARY, WIDTH, LENGTH = 50, 16, 40


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Three rows: two examples, one example, none."""
    random = np.random.default_rng(0)

    def example(prompt: int, *completions: int) -> Example:
        def tokens(count: int) -> np.ndarray:
            return random.integers(0, VOCABULARY, count)

        return Example(tokens(prompt), tuple(map(tokens, completions)))

    rows = [[example(3, 9, 5), example(1, 4, 11)], [example(6, 20, 1)], []]
    return as_batch(rows, length=LENGTH, num_slots=2)


def make_arrays(seed: int, *, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Hidden states of three rows, and an output matrix."""
    random = np.random.default_rng(seed)
    hidden = scale * random.normal(size=(3, LENGTH, WIDTH))
    output = random.normal(size=(VOCABULARY, WIDTH))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(output, jnp.float32)


def weighted(
    hidden: jax.Array,
    output: jax.Array,
    batch: Batch,
    weights: np.ndarray,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    values = completion_log_probs(hidden, output, batch, chunk_size=chunk_size)
    return jnp.sum(weights * values), values


kl = jax.jit(completion_kl, static_argnames="chunk_size")
gradient = jax.jit(jax.grad(weighted, (0, 1), has_aux=True), static_argnums=4)


def compute(
    arrays: tuple[jax.Array, jax.Array], batch: Batch, chunk_size: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities, and the gradients of a weighted sum of them."""
    shape = batch.completion_length.shape
    weights = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    (hidden, output), values = gradient(*arrays, batch, weights, chunk_size)
    return np.asarray(values), np.asarray(hidden), np.asarray(output)


def log_softmax(hidden: jax.Array, output: jax.Array) -> np.ndarray:
    """In float64, at every position."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(output, np.float64).T
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def summed(per_token: np.ndarray, batch: Batch) -> np.ndarray:
    """Scored positions added to their completions one after another."""
    sums = np.zeros(batch.completion_length.shape)
    for row, column in np.argwhere(np.asarray(batch.branch) > 0):
        slot = batch.example[row, column] - 1
        sums[row, slot, batch.branch[row, column] - 1] += per_token[row, column]
    return sums


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_log_probs_equal_a_float64_log_softmax(batch: Batch, scale: float):
    arrays = make_arrays(0, scale=scale)
    labels = np.asarray(batch.labels)[..., None]
    per_token = np.take_along_axis(log_softmax(*arrays), labels, -1)[..., 0]
    found = compute(arrays, batch)[0]
    np.testing.assert_allclose(found, summed(per_token, batch), rtol=2e-6)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_any_chunk_size_gives_the_same_values_and_gradients(
    batch: Batch, chunk_size: int
):
    arrays = make_arrays(2)
    found = compute(arrays, batch, chunk_size)
    for one, other in zip(found, compute(arrays, batch), strict=True):
        largest = float(np.max(np.abs(other)))
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * largest)


def test_sum_completions_adds_each_position_to_its_own_completion(batch: Batch):
    """Powers of two: each sum tells exactly which positions it holds."""
    per_token = jnp.broadcast_to(2.0 ** (jnp.arange(LENGTH) % 20), (3, LENGTH))
    expected = summed(np.asarray(per_token), batch)
    np.testing.assert_array_equal(sum_completions(per_token, batch), expected)


def test_sums_of_squares_equal_those_of_a_float64_softmax(batch: Batch):
    arrays = make_arrays(4)
    squares = np.exp(2 * log_softmax(*arrays)).sum(axis=-1)
    wanted: frozenset[Wanted] = frozenset({"log_sum_squares"})
    per_token = token_values(*arrays, batch, wanted=wanted, chunk_size=8)
    assert per_token.log_sum_squares is not None
    found = sum_completions(per_token.log_sum_squares, batch)
    np.testing.assert_allclose(found, summed(np.log(squares), batch), rtol=1e-5)


def test_the_shared_prefix_is_as_long_as_the_shortest_completion():
    """Completions of 3 and 2 tokens, then of 1 and 3; an absent third one is no limit.

    Of the first example's chosen completion the middle token is another speaker's: its
    scored tokens are 2, and so are those shared.
    """
    ids = np.arange(2, 8, dtype=np.int32)
    masks = np.array([True, False, True]), np.array([True, True])
    first = Example(ids[:3], (ids[:3], ids[:2]), masks=masks)
    second = Example(ids[:1], (ids[:1], ids[:3]))
    batch = as_batch([[first, second]], length=12, num_slots=3, num_completions=3)
    # prompt 2, then 3 + 2; no prompt of its own, then 1 + 3; one of padding
    expected = [0, 0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    assert in_shared_prefix(batch).astype(int).tolist() == [expected]


def test_bfloat16_hidden_states_give_float32_sums():
    """512 tokens sum to about 3000 nats, where neighbouring bfloat16 are 16 apart."""
    random = np.random.default_rng(4)
    example = Example(np.array([1]), (random.integers(0, 300, 512),))
    batch = as_batch([[example]], length=512, num_completions=1)
    hidden = jnp.asarray(random.normal(size=(1, 512, 32)), jnp.bfloat16)
    output = jnp.asarray(0.5 * random.normal(size=(300, 32)), jnp.bfloat16)
    found = completion_log_probs(hidden, output, batch)
    labels = np.asarray(batch.labels)[..., None]
    per_token = np.take_along_axis(log_softmax(hidden, output), labels, -1)
    assert found.dtype == jnp.float32
    assert per_token.sum() < -2500
    assert abs(float(found[0, 0, 0]) - per_token.sum()) < 0.005


def test_chunks_without_scored_positions_contribute_zeros():
    """One scored token in 40 positions, in chunks of 8: four hold nothing."""
    example = Example(np.array([5, 6, 7]), (np.array([8]),))
    batch = as_batch([[example], [], []], length=LENGTH, num_slots=2)
    hidden, output = make_arrays(5)
    values, slope, _ = compute((hidden, output), batch)
    expected = np.zeros((3, 2, 2))
    expected[0, 0, 0] = log_softmax(hidden, output)[0, 2, 8]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_array_equal(slope.any(axis=-1), np.asarray(batch.scored))
    # What stands at a position that is not scored never enters, not even if it is NaN.
    unscored = jnp.asarray(~batch.scored)[..., None]
    changed = jnp.where(unscored, jnp.nan, hidden)
    np.testing.assert_array_equal(compute((changed, output), batch)[0], values)


def test_a_batch_without_scored_positions_gives_zeros():
    batch = as_batch([[], [], []], length=LENGTH, num_slots=2)
    for array in compute(make_arrays(7), batch):
        assert not array.any()


def test_temporaries_do_not_grow_with_length_times_vocabulary():
    num_rows, vocabulary, chunk_size = 2, 8192, 64

    def temporaries(length: int) -> int:
        def total(hidden: jax.Array, output: jax.Array, batch: Batch) -> jax.Array:
            sums = completion_log_probs(hidden, output, batch, chunk_size=chunk_size)
            return jnp.sum(sums)

        hidden = jax.ShapeDtypeStruct((num_rows, length, WIDTH), jnp.float32)
        output = jax.ShapeDtypeStruct((vocabulary, WIDTH), jnp.float32)
        batch = as_batch([[]] * num_rows, length=length)
        step = jax.jit(jax.value_and_grad(total, (0, 1)))
        memory = step.lower(hidden, output, batch).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    short, long = temporaries(256), temporaries(1024)
    chunk = num_rows * chunk_size * vocabulary * 4
    assert long - short < (1024 - 256) / chunk_size * chunk / 20
    assert long < 4 * chunk


def test_kl_equals_a_direct_float64_computation(batch: Batch):
    policy, reference = make_arrays(8), make_arrays(9)
    log_p, log_q = log_softmax(*policy), log_softmax(*reference)
    per_token = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    found = kl(policy, reference, batch)
    np.testing.assert_allclose(found, summed(per_token, batch), rtol=1e-5)


def test_kl_of_equal_models_is_exactly_zero(batch: Batch):
    policy = make_arrays(10)
    assert not kl(policy, policy, batch).any()


@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0, 100.0])
def test_kl_is_never_negative(batch: Batch, distance: float):
    """Up to rounding: 20 tokens, float32, log-probabilities of the order of ten."""
    hidden, output = make_arrays(11)
    moved = hidden + distance * make_arrays(12)[0]
    found = kl((hidden, output), (moved, output), batch)
    assert (found >= -1e-5).all()
    used = np.asarray(batch.completion_length) > 0
    assert distance < 0.01 or (np.asarray(found)[used] > 0).all()
