"""Which examples share batches and rows. Knows lengths only, but for the real data."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data.loader import training_batches
from dpojax.data.order import Order, deal, make_order
from dpojax.data.packing import Example
from dpojax.data.plan import Shape, Small, choose_shape, fill_shape, pack_rows
from dpojax.data.records import load_records
from dpojax.data.tokenize import load_tokenizer, tokenize_records

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(np.array)


def random_lengths(count: int, seed: int = 0) -> np.ndarray:
    """As long as pairs of conversations are: lognormal, of a mean of 217."""
    drawn = np.random.default_rng(seed).lognormal(5.2, 0.6, count)
    return np.clip(drawn, 20, 1_400).astype(int)


# -- Rows -----------------------------------------------------------------------------


@given(LENGTHS, st.integers(50, 120), st.integers(1, 12))
def test_each_example_is_in_one_row_and_none_overflows(
    lengths: np.ndarray, row_length: int, num_slots: int
):
    rows = pack_rows(lengths, row_length, num_slots)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(1 <= len(row) <= num_slots for row in rows)
    assert all(lengths[row].sum() <= row_length for row in rows)
    assert rows == pack_rows(lengths, row_length, num_slots)


def test_by_hand_rows_are_equally_full():
    """5 and 4 begin; 3 joins 4, 2 joins 5, and the ones make both 8."""
    rows = pack_rows(np.array([5, 4, 3, 2, 1, 1]), 8, 6)
    assert rows == [[0, 3, 4], [1, 2, 5]]


def test_by_hand_rows_are_filled_where_equal_ones_would_overflow():
    """Two rows of 12: the sixes must share one, though equal rows would part them."""
    rows = pack_rows(np.array([6, 6, 4, 4, 4]), 12, 5)
    assert rows == [[0, 1], [2, 3, 4]]


def test_rows_have_no_more_examples_than_slots():
    rows = pack_rows(np.full(12, 1), 100, 5)
    assert [len(row) for row in rows] == [4, 4, 4]


# -- Shapes ---------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 5))
def test_a_shape_holds_any_batch_in_rows_that_are_a_multiple(
    lengths: np.ndarray, multiple: int
):
    shape = choose_shape([lengths], longest=50, row_multiple=multiple)
    assert shape.row_length >= 50 and shape.row_length % 16 == 0
    assert all(count % multiple == 0 for count in shape.num_rows)
    assert list(shape.num_rows) == sorted(set(shape.num_rows))
    assert shape.num_rows[-1] >= len(lengths)  # an example a row
    assert len(shape.num_rows) <= 8


def test_of_row_lengths_that_waste_as_little_the_shortest_is_taken():
    batches = [np.full(8, 64)]
    assert choose_shape(batches, longest=64) == Shape(64, (8,), 3)
    # Two rows of 96 hold no more than two of 64 do; three times 64 is 192.
    assert choose_shape(batches, longest=65).row_length == 128


@pytest.mark.parametrize(
    ("longest", "expected"), [(1, 16), (100, 112), (130, 192), (513, 640)]
)
def test_row_lengths_are_multiples_that_hardware_likes(longest: int, expected: int):
    assert choose_shape([np.array([longest])], longest=longest).row_length == expected


def test_a_row_length_that_is_asked_for_is_taken_or_refused():
    batches = [np.array([30, 20, 10])]
    assert choose_shape(batches, longest=30, row_length=40).row_length == 40
    with pytest.raises(
        ValueError, match="row_length is 29, but an example can take 30"
    ):
        choose_shape(batches, longest=30, row_length=29)


def test_batches_without_long_examples_have_shorter_rows():
    """Three of four fit one row of 64 instead of 128."""
    batches = [np.array([40, 20])] * 3 + [np.array([100, 20])]
    shape = choose_shape(batches, longest=128)
    assert shape == Shape(128, (1, 2), 2, Small(1, 64))
    assert fill_shape(batches[0], shape) == ([[0, 1]], 64)
    assert fill_shape(batches[3], shape) == ([[0, 1]], 128)
    assert fill_shape(np.array([60, 60]), shape) == ([[0, 1]], 128)
    assert fill_shape(np.array([120, 60]), shape) == ([[0], [1]], 128)
    assert choose_shape(batches, longest=128, row_length=128).small is None


def test_a_second_row_length_is_not_worth_a_few_positions():
    batches = [np.array([30, 30])] + [np.array([100, 20])] * 20
    assert choose_shape(batches, longest=128).small is None


# -- Batches --------------------------------------------------------------------------


def batches_of(order: Order, batch_size: int, count: int) -> list[np.ndarray]:
    return [order(range(n * batch_size, (n + 1) * batch_size)) for n in range(count)]


@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 70),
    window=st.integers(1, 80),
    row_length=st.sampled_from([None, 50, 100]),
)
def test_every_epoch_sees_each_example_once(
    lengths: np.ndarray, batch_size: int, window: int, row_length: int | None
):
    def whole_run() -> list[np.ndarray]:
        order = make_order(
            lengths,
            batch_size=batch_size,
            seed=3,
            window=window,
            row_length=row_length,
        )
        return batches_of(order, batch_size, -(-3 * len(lengths) // batch_size))

    batches = whole_run()
    assert {len(batch) for batch in batches} == {batch_size}
    seen = np.concatenate(batches)[: 3 * len(lengths)].reshape(3, -1)
    np.testing.assert_array_equal(np.sort(seen), [np.arange(len(lengths))] * 3)
    for one, other in zip(batches, whole_run(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_by_hand_the_longest_go_to_the_batch_that_needs_most():
    """Two batches of three begin with 6 and with 2; 9, 8, 4 and 1 are dealt.

    For 15 each they lack 9 and 13: 9 goes to the second; now they lack 9 and, for one
    example, 4: 8 goes to the first, 4 to the second and 1 is left.
    """
    lengths, ranks = np.array([6, 2, 1, 9, 8, 4]), np.arange(2)
    batches = deal(lengths, 3, np.array([15.0, 15.0]), ranks)
    assert [batch.tolist() for batch in batches] == [[0, 4, 2], [1, 3, 5]]
    # For 23 and 7 the first lacks 17 and gets both long ones.
    batches = deal(lengths, 3, np.array([23.0, 7.0]), ranks)
    assert [batch.tolist() for batch in batches] == [[0, 3, 4], [1, 5, 2]]


@pytest.mark.parametrize("batch_size", [8, 64])
def test_batches_are_alike_also_where_epochs_meet(batch_size: int):
    lengths = random_lengths(1_001)
    order = make_order(lengths, batch_size=batch_size, seed=0)
    sums = [lengths[batch].sum() for batch in batches_of(order, batch_size, 40)]
    assert np.std(sums) < 0.03 * np.mean(sums)
    drawn = np.random.default_rng(0).permutation(lengths)[: 10 * batch_size]
    assert np.std(drawn.reshape(10, -1).sum(1)) > 0.05 * np.mean(sums)


def test_examples_move_within_their_window_only():
    """So that a stream could be dealt: nothing later than the window is looked at."""
    lengths = random_lengths(400)
    order = make_order(lengths, batch_size=10, seed=0, window=100)
    seen = np.concatenate(batches_of(order, 10, 40))
    permuted = np.random.default_rng((0, 0)).permutation(400)
    for start in range(0, 400, 100):
        here = slice(start, start + 100)
        assert set(seen[here]) == set(permuted[here])
        assert seen[here].tolist() != permuted[here].tolist()


def test_no_two_epochs_have_the_same_batches():
    """Two examples share a batch again nearly as seldom as by chance."""
    lengths, epochs = random_lengths(1_024), []
    order = make_order(lengths, batch_size=16, seed=0)
    for batches in np.split(np.array(batches_of(order, 16, 3 * 64)), 3):
        batch_of = np.empty(1_024, int)
        batch_of[batches] = np.arange(64)[:, None]
        epochs.append(batch_of[:, None] == batch_of)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        again = np.sum(epochs[one] & epochs[other]) - 1_024
        by_chance = 1_024 * 15 * 15 / 1_023
        assert again < 2 * by_chance


def test_batches_of_one_come_in_any_order_of_length():
    lengths = random_lengths(50)
    order = np.concatenate(batches_of(make_order(lengths, batch_size=1, seed=0), 1, 50))
    falls = np.diff(lengths[order]) < 0
    assert 15 < np.count_nonzero(falls) < 35


def test_for_rows_that_are_asked_for_some_batches_have_one_more_than_others():
    """All alike, batches would need eight rows, most of the last one being padding."""
    lengths, row_length = random_lengths(64 * 40), 1_850

    def num_rows(asked: int | None) -> list[int]:
        order = make_order(lengths, batch_size=64, seed=0, row_length=asked)
        batches = batches_of(order, 64, 40)
        return [len(pack_rows(lengths[batch], row_length, 64)) for batch in batches]

    assert set(num_rows(None)) == {8}
    found = num_rows(row_length)
    assert set(found) == {7, 8} and 1 - lengths.sum() / sum(found) / row_length < 0.03
    assert found != sorted(found) and found != sorted(found, reverse=True)


def test_ten_thousand_rows_are_planned_in_under_a_second():
    """Of 2,048 positions: their examples are dealt to batches, then packed."""
    lengths = random_lengths(93_000)
    start = time.process_time()
    order = make_order(lengths, batch_size=64, seed=0)
    batches = batches_of(order, 64, len(lengths) // 64)
    shape = choose_shape([lengths[b] for b in batches[:32]], longest=1_400)
    rows = [pack_rows(lengths[b], 2_048, shape.num_slots) for b in batches]
    took = time.process_time() - start
    assert sum(map(len, rows)) > 10_000
    assert took < 1


# -- Real data ------------------------------------------------------------------------


def conversations(shared: Path, max_length: int) -> Sequence[Example]:
    """Pairs of Anthropic's Helpful and Harmless, in GPT-2's tokens."""
    path = shared / "data" / "hh_harmless_base_test.jsonl.gz"
    records, _ = load_records([str(path)], split="train", kind="pair", test_size=0)
    tokenizer = load_tokenizer(shared / "tokenizers" / "gpt2_encoder.json")
    return tokenize_records(records, tokenizer, max_length=max_length)[0]


@pytest.mark.parametrize(
    ("max_length", "row_length", "most"),
    [(1_024, 2_048, 0.03), (256, 512, 0.08), (1_024, None, 0.03), (256, None, 0.08)],
)
def test_real_pairs_leave_little_padding_in_few_shapes(
    shared: Path, max_length: int, row_length: int | None, most: float
):
    """Two epochs of batches of 64; two positions of every `max_length` fit a row."""
    examples = conversations(shared, max_length)
    num_steps = 2 * len(examples) // 64
    batches = training_batches(
        examples,
        batch_size=64,
        num_seen=64 * num_steps,
        seed=0,
        start=0,
        stop=num_steps,
        row_length=row_length,
    )
    used, shapes = [], []
    for batch in batches:
        used.append(np.count_nonzero(batch.example))
        shapes.append(batch.tokens.shape)
        assert np.count_nonzero(batch.live) == 64
    assert 1 - sum(used) / sum(rows * length for rows, length in shapes) < most
    assert len(set(shapes)) <= 3
