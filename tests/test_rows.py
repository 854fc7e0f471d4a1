"""Log-probabilities do not depend on how completions share rows.

Through a random tiny decoder, because that is where tokens could see each other.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.batch import Batch
from dpojax.data.packing import Example, as_batch
from dpojax.log_probs import completion_log_probs
from dpojax.models.decoder import DecoderConfig, make_model
from dpojax.models.functional import Params

BOS, EOS, VOCABULARY = 1, 2, 40
Function = Callable[[Params, Batch], jax.Array]

# Prompts of nothing (BOS only), of one token and of many; one to three completions.
PROMPTS = [[BOS], [BOS, 7], [BOS, 5, 9, 30, 31, 9, 12, 4, 6]]
COMPLETIONS = [
    [[11, 12, EOS], [13, EOS]],
    [[20, EOS], [21, 22, 23, EOS], [EOS]],
    [[14, 15, 16, 17, 18, EOS], [14, 15, 33, EOS]],
]


class Decoder(NamedTuple):
    params: Params
    log_probs: Function  # [rows, slots, completions]
    gradient: Function  # of their sum, to the parameters


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = DecoderConfig(
        vocabulary_size=VOCABULARY,
        width=32,
        num_layers=2,
        num_heads=4,
        num_key_heads=2,
        head_dimension=8,
        mlp_width=48,
        qkv_bias=True,
        initializer_range=0.3,
    )
    model = make_model(config)

    def log_probs(params: Params, batch: Batch) -> jax.Array:
        hidden, output = model.apply(params, batch)
        return completion_log_probs(hidden, output, batch, chunk_size=8)

    def total(params: Params, batch: Batch) -> jax.Array:
        return jnp.sum(log_probs(params, batch))

    params = jax.jit(model.init)(jax.random.key(0))
    return Decoder(params, jax.jit(log_probs), jax.jit(jax.grad(total)))


def as_examples(prompts: list, completions: list) -> list[Example]:
    return [
        Example(np.array(prompt), tuple(map(np.array, answers)))
        for prompt, answers in zip(prompts, completions, strict=True)
    ]


def lay_out(rows: list[list[Example]]) -> Batch:
    """Always of one shape, because a function compiles once per shape."""
    rows = rows + [[]] * (7 - len(rows))
    return as_batch(rows, length=32, num_slots=2, num_completions=3)


def shared(prompts: list, completions: list) -> Batch:
    """All examples in two rows; the others hold only padding."""
    first, second, third = as_examples(prompts, completions)
    return lay_out([[first, third], [second]])


def unshared(prompts: list, completions: list) -> Batch:
    """Each prompt and completion in a row of its own."""
    examples = as_examples(prompts, completions)
    return lay_out(
        [[Example(e.prompt, (tokens,))] for e in examples for tokens in e.completions]
    )


def in_order(log_probs: jax.Array) -> np.ndarray:
    """The log-probabilities of `shared` in the order of `unshared`."""
    values = np.asarray(log_probs)
    parts = values[0, 0, :2], values[1, 0], values[0, 1, :2]
    return np.concatenate(parts)


def test_a_shared_row_gives_the_log_probs_of_separate_sequences(decoder: Decoder):
    together = decoder.log_probs(decoder.params, shared(PROMPTS, COMPLETIONS))
    apart = decoder.log_probs(decoder.params, unshared(PROMPTS, COMPLETIONS))
    np.testing.assert_allclose(in_order(together), apart[:, 0, 0], rtol=1e-5, atol=1e-5)


def test_a_row_written_by_hand_gives_the_log_probs_of_separate_sequences(
    decoder: Decoder,
):
    """The row of `dpojax.batch`: a prompt of four and one of two, two completions each.

    Entries past the last branch are padding, whose tokens and labels say nothing.
    """
    table = """
    tokens    1 5 9 4 7 8 3 4 6 1 3 11 3 12 13 9 9
    labels    0 0 0 7 8 3 2 6 2 0 11 2 12 13 2 9 9
    position  0 1 2 3 4 5 6 3 4 0 1 2 1 2 3 0 0
    example   1 1 1 1 1 1 1 1 1 2 2 2 2 2 2 0 0
    branch    0 0 0 1 1 1 1 2 2 0 1 1 2 2 2 0 0
    """
    lines = [line.split()[1:] for line in table.strip().splitlines()]
    arrays = np.zeros((5, 7, 32), np.int32)
    arrays[:, 0, : len(lines[0])] = np.array(lines, np.int32)
    lengths = np.zeros((7, 2, 3), np.int32)
    lengths[0] = [[4, 2, 0], [2, 3, 0]]
    score, weight = np.zeros(lengths.shape), np.ones(lengths.shape[:2])
    row = Batch(*arrays, completion_length=lengths, score=score, weight=weight)
    prompts = [[1, 5, 9, 4], [1, 3]]
    completions = [[[7, 8, 3, 2], [6, 2]], [[11, 2], [12, 13, 2]]]
    found = decoder.log_probs(decoder.params, row)[0, :, :2].ravel()
    expected = decoder.log_probs(decoder.params, unshared(prompts, completions))
    np.testing.assert_allclose(found, expected[:4, 0, 0], rtol=1e-5, atol=1e-5)


def test_empty_slots_and_completions_give_exactly_zero(decoder: Decoder):
    batch = shared(PROMPTS, COMPLETIONS)
    values = np.asarray(decoder.log_probs(decoder.params, batch))
    empty = np.asarray(batch.completion_length) == 0
    assert empty.sum() == empty.size - 7
    assert (values[empty] == 0.0).all() and (values[~empty] < 0.0).all()


@pytest.mark.parametrize("changed", range(7))
def test_changing_a_completion_leaves_the_others_bit_identical(
    decoder: Decoder, changed: int
):
    before = in_order(decoder.log_probs(decoder.params, shared(PROMPTS, COMPLETIONS)))
    flat = [(e, k) for e in range(3) for k in range(len(COMPLETIONS[e]))]
    example, branch = flat[changed]
    completions = [[list(tokens) for tokens in answers] for answers in COMPLETIONS]
    length = len(completions[example][branch])
    completions[example][branch] = [35 + i for i in range(length)]
    after = in_order(decoder.log_probs(decoder.params, shared(PROMPTS, completions)))
    np.testing.assert_array_equal(before == after, np.arange(7) != changed)


@pytest.mark.parametrize(("changed", "own"), [(0, [0, 1]), (2, [5, 6])])
def test_changing_a_prompt_leaves_the_other_examples_bit_identical(
    decoder: Decoder, changed: int, own: list[int]
):
    before = in_order(decoder.log_probs(decoder.params, shared(PROMPTS, COMPLETIONS)))
    prompts = [list(prompt) for prompt in PROMPTS]
    prompts[changed][0] = 3
    after = in_order(decoder.log_probs(decoder.params, shared(prompts, COMPLETIONS)))
    expected = [number not in own for number in range(7)]
    np.testing.assert_array_equal(before == after, expected)


def test_padding_may_hold_anything(decoder: Decoder):
    batch = shared(PROMPTS, COMPLETIONS)
    before = decoder.log_probs(decoder.params, batch)
    noise = np.random.default_rng(0).integers(0, VOCABULARY, batch.tokens.shape)
    padding = np.asarray(batch.example) == 0
    noisy = batch._replace(
        tokens=np.where(padding, noise, batch.tokens).astype(np.int32),
        labels=np.where(batch.scored, batch.labels, noise).astype(np.int32),
    )
    np.testing.assert_array_equal(before, decoder.log_probs(decoder.params, noisy))


def test_gradients_of_the_sum_agree(decoder: Decoder):
    together = decoder.gradient(decoder.params, shared(PROMPTS, COMPLETIONS))
    apart = decoder.gradient(decoder.params, unshared(PROMPTS, COMPLETIONS))

    def compare(one: jax.Array, other: jax.Array) -> None:
        largest = float(jnp.max(jnp.abs(other)))
        assert largest > 0
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * largest)

    jax.tree.map(compare, together, apart)
