"""The row layout, token by token. Knows `Batch` and `dpojax.data.packing` only."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.batch import Batch
from dpojax.data.packing import (
    Example,
    as_batch,
    bucket_length,
    pack,
    row_length,
    row_lengths,
    with_mismatched,
)
from dpojax.data.plan import Shape, choose_shape


def as_example(prompt: Sequence[int], *completions: Sequence[int]) -> Example:
    arrays = tuple(np.array(tokens, np.int32) for tokens in completions)
    return Example(np.array(prompt, np.int32), arrays)


def test_the_row_that_is_drawn_in_the_docstring():
    """Its second example has completions c1 and r1 r2; two positions are padding.

    Prompts are tens, the chosen 2x and 5x, the rejected 3x and 6x, $ is 2. The examples
    take 4 - 1 + 4 + 3 and 2 - 1 + 2 + 3 positions.
    """
    first = as_example([10, 11, 12, 13], [21, 22, 23, 2], [31, 32, 2])
    second = as_example([40, 41], [51, 2], [61, 62, 2])
    batch = as_batch([[first, second]], length=18, num_slots=2)
    # fmt: off
    #           p0  p1  p2 |p3  c1  c2  c3 |p3  r1  r2 |q0 |q1  c1 |q1  r1  r2 | .   .
    tokens =   [10, 11, 12, 13, 21, 22, 23, 13, 31, 32, 40, 41, 51, 41, 61, 62,  0,  0]
    labels =   [ 0,  0,  0, 21, 22, 23,  2, 31, 32,  2,  0, 51,  2, 61, 62,  2,  0,  0]
    position = [ 0,  1,  2,  3,  4,  5,  6,  3,  4,  5,  0,  1,  2,  1,  2,  3,  0,  0]
    example =  [ 1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  2,  2,  2,  2,  2,  2,  0,  0]
    branch =   [ 0,  0,  0,  1,  1,  1,  1,  2,  2,  2,  0,  1,  1,  2,  2,  2,  0,  0]
    # fmt: on
    assert batch.tokens.tolist() == [tokens]
    assert batch.labels.tolist() == [labels]
    assert batch.position.tolist() == [position]
    assert batch.example.tolist() == [example]
    assert batch.branch.tolist() == [branch]
    assert batch.completion_length.tolist() == [[[4, 3], [2, 3]]]
    assert batch.scored.tolist() == [[number > 0 for number in branch]]
    assert batch.live.tolist() == [[True, True]]


def test_a_prompt_of_one_token_has_no_position_of_its_own():
    batch = as_batch([[as_example([1], [7, 8, 2], [9, 2])]], length=6)
    assert batch.tokens.tolist() == [[1, 7, 8, 1, 9, 0]]
    assert batch.labels.tolist() == [[7, 8, 2, 9, 2, 0]]
    assert batch.position.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.example.tolist() == [[1, 1, 1, 1, 1, 0]]
    assert batch.branch.tolist() == [[1, 1, 1, 2, 2, 0]]


def test_one_completion_is_the_plain_sequence_shifted_by_one():
    batch = as_batch([[as_example([5, 6], [7, 2])]], length=4, num_completions=1)
    assert batch.tokens.tolist() == [[5, 6, 7, 0]]
    assert batch.labels.tolist() == [[0, 7, 2, 0]]
    assert batch.position.tolist() == [[0, 1, 2, 0]]
    assert batch.completion_length.tolist() == [[[2]]]


def test_fewer_completions_than_columns_have_length_zero():
    batch = as_batch([[as_example([5], [7, 2])]], length=4, num_completions=3)
    assert batch.completion_length.tolist() == [[[2, 0, 0]]]


def test_an_empty_row_is_padding_and_is_not_live():
    batch = as_batch([[], [as_example([5, 6], [7, 2], [2])], []], length=8)
    for array in jax.tree.leaves(batch):
        assert not array[[0, 2]].any()
    assert batch.live.tolist() == [[False], [True], [False]]
    assert not batch.scored[[0, 2]].any()


def test_every_array_has_32_bits():
    batch = as_batch([[as_example([5, 6], [7, 2], [2])]], length=8)
    *integers, score, weight = jax.tree.leaves(batch)
    assert {array.dtype for array in integers} == {np.dtype(np.int32)}
    assert score.dtype == weight.dtype == np.float32


def test_scores_weights_and_unscored_turns_stand_beside_their_completions():
    """The second completion's middle token is another speaker's: label -1."""
    ids = [np.array(tokens, np.int32) for tokens in ([5, 6], [7, 2], [8, 9, 2])]
    masks = np.array([True, True]), np.array([True, False, True])
    example = Example(ids[0], (ids[1], ids[2]), (0.5, -2.0), 3.0, masks)
    batch = as_batch([[example]], length=8, num_slots=2, num_completions=3)
    assert batch.labels.tolist() == [[0, 7, 2, 8, -1, 2, 0, 0]]
    assert batch.scored.tolist() == [[False, *[True] * 3, False, True, False, False]]
    assert batch.completion_length.tolist() == [[[2, 2, 0], [0, 0, 0]]]
    assert batch.score.tolist() == [[[0.5, -2.0, 0.0], [0.0, 0.0, 0.0]]]
    assert batch.weight.tolist() == [[3.0, 0.0]]


def test_a_row_that_is_exactly_full_is_allowed_and_one_more_position_is_refused():
    example = as_example([5, 6], [7, 2], [2])
    assert row_length(example) == 4
    assert as_batch([[example]], length=4).tokens.shape == (1, 4)
    with pytest.raises(ValueError, match="Row 1 holds 1 examples of 4 positions"):
        as_batch([[], [example]], length=3)


def test_more_examples_than_slots_are_refused():
    example = as_example([5, 6], [7, 2], [2])
    with pytest.raises(ValueError, match="it has 1 slots and 16 positions"):
        as_batch([[example, example]], length=16)


def test_the_first_buckets():
    buckets = sorted({bucket_length(length) for length in range(1, 385)})
    assert buckets == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384]
    counts = sorted({bucket_length(count, smallest=1) for count in range(1, 25)})
    assert counts == [1, 2, 3, 4, 6, 8, 12, 16, 24]


def test_a_bucket_is_the_smallest_that_holds_the_length():
    for length in range(1, 3000):
        bucket = bucket_length(length)
        assert bucket >= length
        assert bucket_length(bucket) == bucket
        assert bucket >= bucket_length(length - 1)
        if length >= 16:
            assert bucket - length < bucket / 2
            assert bucket - length <= length / 2


tokens = st.lists(st.integers(1, 99), min_size=1, max_size=6)
examples = st.builds(
    lambda prompt, completions: as_example(prompt, *completions),
    tokens,
    st.lists(tokens, min_size=1, max_size=3),
)


@given(st.lists(st.lists(examples, max_size=3), min_size=1, max_size=4))
def test_the_examples_can_be_read_back_from_the_rows(rows: list[list[Example]]):
    length = max(sum(map(row_length, row)) for row in rows) + 1
    batch = as_batch(rows, length=length, num_slots=3, num_completions=3)
    for row, row_examples in enumerate(rows):
        used = sum(map(row_length, row_examples))
        assert np.count_nonzero(batch.example[row]) == used
        assert not any(array[row, used:].any() for array in batch[:5])
        for slot in range(3):
            if slot < len(row_examples):
                check_example(batch, row, slot, row_examples[slot])
            else:
                assert not batch.live[row, slot]


def check_example(batch: Batch, row: int, slot: int, example: Example) -> None:
    """Every token is a label once, positions count on, lengths are those scored."""
    mine = batch.example[row] == slot + 1
    shared = mine & (batch.branch[row] == 0)
    prompt = example.prompt.tolist()
    assert batch.tokens[row, shared].tolist() == prompt[:-1]
    assert not batch.labels[row, shared].any()
    assert batch.position[row, shared].tolist() == list(range(len(prompt) - 1))
    for k in range(3):
        here = mine & (batch.branch[row] == k + 1)
        count = int(np.count_nonzero(here & batch.scored[row]))
        assert batch.completion_length[row, slot, k] == count
        if k >= len(example.completions):
            assert count == 0
            continue
        completion = example.completions[k].tolist()
        assert batch.labels[row, here].tolist() == completion
        assert batch.tokens[row, here].tolist() == [prompt[-1], *completion[:-1]]
        first = len(prompt) - 1
        positions = list(range(first, first + len(completion)))
        assert batch.position[row, here].tolist() == positions


pairs = st.builds(
    lambda prompt, completions: as_example(prompt, *completions),
    tokens,
    st.lists(tokens, min_size=2, max_size=2),
)


@given(st.lists(pairs, min_size=1, max_size=40), st.integers(1, 4))
def test_packing_keeps_every_example_whole(some: list[Example], multiple: int):
    lengths = row_lengths(some)
    shape = choose_shape([lengths], longest=int(lengths.max()), row_multiple=multiple)
    batch = pack(some, shape)
    expected = {(rows, shape.row_length) for rows in shape.num_rows} | {shape.small}
    assert batch.tokens.shape in expected
    assert batch.tokens.shape[0] % multiple == 0
    found = sorted(
        tuple(batch.completion_length[row, slot].tolist())
        for row, slot in np.argwhere(batch.live)
    )
    assert found == sorted(tuple(map(len, one.completions)) for one in some)


def test_rows_of_equal_examples_are_filled():
    example = Example(np.arange(3, dtype=np.int32), (np.arange(7, dtype=np.int32),))
    batch = pack([example] * 8, Shape(36, (2, 4), 4))  # each takes nine positions
    assert batch.tokens.shape == (2, 36)
    assert np.all(batch.example > 0)


def test_a_batch_has_the_first_number_of_rows_that_is_enough():
    example = Example(np.arange(3, dtype=np.int32), (np.arange(7, dtype=np.int32),))
    batch = pack([example] * 9, Shape(36, (2, 4, 8), 4))
    assert batch.tokens.shape == (4, 36)
    assert np.count_nonzero(batch.live) == 9


def test_mismatched_completions_avoid_those_of_the_same_prompt():
    """Two prompts in turn, twice: completions move on by one place, not by two."""
    rows = [([5], [1, 2]), ([6], [3, 2]), ([5], [7, 2]), ([6], [8, 9, 2])]
    examples = [as_example(prompt, completion) for prompt, completion in rows]
    mixed = with_mismatched(examples, max_length=3)
    seconds = [example.completions[1].tolist() for example in mixed]
    assert seconds == [[8, 9], [1, 2], [3, 2], [7, 2]]  # the longest is cut to fit
    assert [example.completions[0].tolist() for example in mixed] == [
        c for _, c in rows
    ]
    with pytest.raises(ValueError, match="at least two"):
        with_mismatched(examples[:1], max_length=3)
