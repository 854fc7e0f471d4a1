"""Rewards: by hand, in shared rows, against separate sequences."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.batch import Batch
from dpojax.data.packing import Example, as_batch, end_as_input
from dpojax.log_probs import completion_log_probs
from dpojax.models.decoder import DecoderConfig, Model, make_model
from dpojax.models.functional import Params
from dpojax.rewards import branch_ends, completion_rewards
from dpojax.scoring import make_score_step, score_examples
from dpojax.sharding import as_shardings, make_constrain, make_mesh, make_placement

BOS, EOS = 1, 2
CONFIG = DecoderConfig(
    vocabulary_size=40,
    width=32,
    num_layers=2,
    num_heads=4,
    num_key_heads=2,
    head_dimension=8,
    mlp_width=48,
    initializer_range=0.3,
    tied_output=True,
    head="score",
)


def as_example(prompt: list[int], *completions: list[int]) -> Example:
    arrays = tuple(np.array(tokens, np.int32) for tokens in completions)
    return Example(np.array(prompt, np.int32), arrays)


EXAMPLES = [
    as_example([BOS], [11, 12, EOS], [13, EOS]),
    as_example([BOS, 7], [20, EOS], [21, 22, 23, EOS], [EOS]),
    as_example([BOS, 5, 9, 30], [14, 15, 16, EOS], [14, 15, 33, EOS]),
]


@pytest.fixture(scope="module")
def two_rows() -> Batch:
    """All examples, their ends as inputs, in two rows; the third holds padding."""
    first, second, third = map(end_as_input, EXAMPLES)
    rows = [[first, third], [second], []]
    return as_batch(rows, length=20, num_slots=2, num_completions=3)


# -- Where a reward is read ----------------------------------------------------------


def test_by_hand_the_reward_is_read_at_the_end_of_each_branch():
    """One row of width 2, h at position i is (i, 10 i), and w = (1, 0.5).

    Prompt 5 6, completions 7 8 $ and 9 $. With their ends as inputs the row is
    5 | 6 7 8 $ | 6 9 $ | 0: the branches end at positions 4 and 7, so the rewards are
    4 + 20 = 24 and 7 + 35 = 42.
    """
    example = end_as_input(as_example([5, 6], [7, 8, EOS], [9, EOS]))
    batch = as_batch([[example]], length=9)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, EOS, 6, 9, EOS, 0]]
    index = jnp.arange(9.0)
    hidden = jnp.stack([index, 10 * index], axis=-1)[None]
    found = completion_rewards(hidden, jnp.array([[1.0, 0.5]]), batch)
    assert found.tolist() == [[[24.0, 42.0]]]


def test_ends_are_the_largest_positions_of_each_example_and_branch(two_rows: Batch):
    found = np.argwhere(np.asarray(branch_ends(two_rows)))
    expected = {}
    for row, column in np.argwhere(two_rows.branch > 0):
        key = row, two_rows.example[row, column], two_rows.branch[row, column]
        expected[key] = (row, column)
    assert sorted(map(tuple, found)) == sorted(expected.values())
    assert len(expected) == 7
    assert (two_rows.tokens[tuple(found.T)] == EOS).all()


def test_a_branch_may_end_with_the_row():
    example = end_as_input(as_example([5], [7, EOS]))
    batch = as_batch([[example]], length=3, num_completions=1)
    assert np.asarray(branch_ends(batch)).tolist() == [[False, False, True]]


def test_gradients_reach_the_ends_alone_and_padding_may_hold_anything(two_rows: Batch):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(3, 20, 8)), jnp.float32)
    head = jnp.asarray(random.normal(size=(1, 8)), jnp.float32)
    ends = np.asarray(branch_ends(two_rows))

    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return jnp.sum(completion_rewards(hidden, head, two_rows))

    slopes = jax.grad(total, (0, 1))(hidden, head)
    expected = np.where(ends[..., None], np.asarray(head)[0], 0)
    np.testing.assert_array_equal(slopes[0], expected)
    at_ends = np.asarray(hidden)[ends].sum(axis=0)
    np.testing.assert_allclose(slopes[1][0], at_ends, rtol=1e-5)
    noisy = jnp.where(ends[..., None], hidden, jnp.nan)
    for one, other in zip(slopes, jax.grad(total, (0, 1))(noisy, head), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bfloat16_hidden_states_give_float32_products():
    """The sum of 4096 products of bfloat16 numbers, as float64 has it."""
    random = np.random.default_rng(1)
    hidden = jnp.asarray(random.normal(size=(1, 2, 4096)), jnp.bfloat16)
    head = jnp.asarray(random.normal(size=(1, 4096)), jnp.float32)
    batch = as_batch([[as_example([5], [7, EOS])]], length=2, num_completions=1)
    found = completion_rewards(hidden, head, batch)
    assert found.dtype == jnp.float32
    expected = np.asarray(hidden, np.float64)[0, 1] @ np.asarray(head, np.float64)[0]
    np.testing.assert_allclose(found, [[[expected]]], rtol=1e-5)


# -- Ends as inputs ------------------------------------------------------------------


def test_the_copy_of_an_end_is_not_scored():
    """So lengths and log-probabilities are those of the example as it was."""
    random = np.random.default_rng(2)
    output = jnp.asarray(random.normal(size=(40, 8)), jnp.float32)
    values = []
    for example in (EXAMPLES[1], end_as_input(EXAMPLES[1])):
        batch = as_batch([[example]], length=12, num_completions=3)
        assert batch.completion_length.tolist() == [[[2, 4, 1]]]
        # The same hidden state wherever the same token is to be predicted.
        hidden = output[jnp.maximum(batch.labels, 0)]
        values.append(completion_log_probs(hidden, output, batch))
    np.testing.assert_allclose(*values, rtol=1e-6)


def test_masks_scores_and_weight_stay():
    masked = as_example([5], [7, 8, EOS])._replace(
        masks=(np.array([False, True, True]),), scores=(0.5,), weight=3.0
    )
    found = end_as_input(masked)
    assert found.completions[0].tolist() == [7, 8, EOS, EOS]
    assert found.masks is not None
    assert found.masks[0].tolist() == [False, True, True, False]
    assert (found.scores, found.weight) == ((0.5,), 3.0)
    assert found.completions[0].dtype == np.int32


def test_an_end_that_is_the_padding_token_is_passed_over():
    """A cut completion has no EOS; it is read at its last token all the same."""
    example = end_as_input(as_example([5], [7, 8, EOS], [9, 10]), padding=EOS)
    assert [tokens.tolist() for tokens in example.completions] == [
        [7, 8, EOS],
        [9, 10, 10],
    ]


# -- Through a decoder ---------------------------------------------------------------


class Made(NamedTuple):
    model: Model
    params: Params


@pytest.fixture(scope="module")
def made() -> Made:
    model = make_model(CONFIG)
    return Made(model, jax.jit(model.init)(jax.random.key(0)))


def rewards_of(made: Made, rows: list[list[Example]]) -> np.ndarray:
    """Always of one shape, because a function compiles once per shape."""
    rows = rows + [[]] * (8 - len(rows))
    batch = as_batch(rows, length=32, num_slots=2, num_completions=3)
    return np.asarray(make_score_step(made.model.apply)(made.params, batch))


def separately(made: Made) -> np.ndarray:
    """Each prompt and completion as a plain sequence, read at its last token."""
    rows = []
    for example in EXAMPLES:
        for completion in example.completions:
            tokens = np.concatenate([example.prompt, completion])
            rows.append([Example(tokens[:1], (np.append(tokens[1:], 0),))])
    return rewards_of(made, rows)[:7, 0, 0]


def test_a_reward_model_has_one_row_in_place_of_the_output_matrix(made: Made):
    assert made.params.keys() == {"embedding", "blocks", "norm", "score"}
    assert made.params["score"]["embedding"].shape == (1, 32)


def test_a_new_head_has_the_spread_of_its_source():
    wide = make_model(replace(CONFIG, width=4096, num_layers=1))
    head = jax.jit(lambda key: wide.init(key)["score"])(jax.random.key(0))["embedding"]
    np.testing.assert_allclose(jnp.std(head), 4097**-0.5, rtol=0.05)


def test_shared_rows_give_the_rewards_of_separate_sequences(made: Made):
    first, second, third = map(end_as_input, EXAMPLES)
    found = rewards_of(made, [[first, third], [second]])
    parts = found[0, 0, :2], found[1, 0], found[0, 1, :2]
    expected = separately(made)
    assert expected.std() > 0.1
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5, atol=1e-5)
    assert np.count_nonzero(found) == 7


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 2, 2)])
def test_scores_on_a_mesh_come_in_the_order_of_the_examples(
    made: Made, sizes: tuple[int, int, int]
):
    mesh = make_mesh(*sizes)
    model = make_model(CONFIG, constrain=make_constrain(mesh))
    shardings = as_shardings(made.params, mesh)
    found = score_examples(
        make_score_step(model.apply),
        jax.device_put(made.params, shardings),
        [end_as_input(example) for example in reversed(EXAMPLES)],
        batch_size=2,
        placement=make_placement(mesh),
    )
    assert [len(values) for values in found] == [2, 3, 2]
    in_order = np.concatenate(list(reversed(found)))
    np.testing.assert_allclose(in_order, separately(made), rtol=1e-5, atol=1e-5)


def test_rewards_of_sharded_rows_need_no_communication():
    mesh = make_mesh()
    batch = as_batch([[end_as_input(EXAMPLES[0])]] * 4, length=16)
    placed = make_placement(mesh).put((np.ones((4, 16, 8), np.float32), batch))
    step = jax.jit(completion_rewards)
    text = step.lower(placed[0], jnp.ones((1, 8)), placed[1]).compile().as_text()
    assert text is not None
    collectives = "all-gather", "all-reduce", "all-to-all", "collective-permute"
    assert not [name for name in collectives if name in text]
