"""Batches as a function of seed and step. Knows no text and no model."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from dpojax.batch import Batch
from dpojax.data.loader import (
    batches_of_seeds,
    counted_batches,
    evaluation_batches,
    fingerprint,
    packed_batches,
    training_batches,
)
from dpojax.data.packing import Example


def as_example(prompt: list[int], *completions: list[int]) -> Example:
    arrays = tuple(np.array(tokens, np.int32) for tokens in completions)
    return Example(np.array(prompt, np.int32), arrays)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Ten pairs of growing length; the first label of each tells which it is."""
    return [as_example([1, 5], [100 + n, *[7] * n, 2], [200 + n, 2]) for n in range(10)]


def batches(examples: list[Example], **settings: int) -> list[Batch]:
    defaults = {"batch_size": 4, "num_seen": 30, "seed": 0, "start": 0, "stop": 8}
    return list(training_batches(examples, **(defaults | settings)))


def numbers(batch: Batch) -> list[int]:
    """Which examples the rows hold, in order of length, which is their number."""
    return sorted(
        int(label) - 100 for label in np.ravel(batch.labels) if 100 <= label < 200
    )


def order(some: list[Batch]) -> list[int]:
    return [number for batch in some for number in numbers(batch)]


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name, array in one._asdict().items():
            np.testing.assert_array_equal(array, other._asdict()[name], err_msg=name)


@pytest.mark.parametrize("start", [1, 3, 7])
def test_a_run_that_starts_later_gets_the_same_batches(
    examples: list[Example], start: int
):
    assert_equal(batches(examples)[start:], batches(examples, start=start))


def test_the_rows_of_several_processes_make_the_whole_batch(examples: list[Example]):
    """Of four processes the last has rows of padding alone at times."""
    known = [
        one._replace(reference=(-1.0, -2.0), reference_prefix=(-0.5, -1.5))
        for one in examples
    ]
    settings: dict[str, Any] = {"batch_size": 4, "num_seen": 10, "seed": 0}
    settings |= {"start": 0, "stop": 3, "row_multiple": 4}

    def part_of(process: int) -> list[tuple[int, Batch]]:
        def own_rows(num_rows: int) -> Iterable[int]:
            return np.arange(num_rows).reshape(4, -1)[process]

        return list(counted_batches(known, own_rows=own_rows, **settings))

    wholes = list(training_batches(known, **settings))
    parts = [part_of(process) for process in range(4)]
    for whole, *counted in zip(wholes, *parts, strict=True):
        counts, own = zip(*counted, strict=True)
        assert set(counts) == {np.count_nonzero(whole.example)}
        joined = Batch(*map(np.concatenate, zip(*own, strict=True)))
        assert_equal([joined], [whole])
    assert any(not batch.example.any() for part in parts for _, batch in part)


def test_a_run_that_stops_earlier_gets_the_same_batches(examples: list[Example]):
    assert_equal(batches(examples)[:3], batches(examples, stop=3))


def test_a_start_at_the_end_gives_no_batch(examples: list[Example]):
    assert batches(examples, start=8) == []


def test_every_epoch_sees_every_example_once_in_another_order(examples: list[Example]):
    seen = order(batches(examples, batch_size=5, stop=6))
    epochs = [seen[start : start + 10] for start in (0, 10, 20)]
    assert len(seen) == 30
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_spans_the_end_of_an_epoch_without_a_gap(examples: list[Example]):
    assert [len(numbers(batch)) for batch in batches(examples)] == [4] * 7 + [2]


def test_rows_are_filled_up_to_a_multiple_with_empty_ones(examples: list[Example]):
    last = batches(examples, row_multiple=4)[-1]
    assert last.tokens.shape[0] == 4
    assert np.sum(last.live) == 2


def test_a_batch_larger_than_the_data_holds_several_epochs(examples: list[Example]):
    (batch,) = batches(examples, batch_size=20, num_seen=20, stop=1)
    assert sorted(numbers(batch)) == sorted([*range(10), *range(10)])


def test_another_seed_gives_another_order(examples: list[Example]):
    assert order(batches(examples)) == order(batches(examples))
    assert order(batches(examples)) != order(batches(examples, seed=1))


def test_batches_of_several_seeds_are_those_of_each_in_one_shape(
    examples: list[Example],
):
    """Rows are long and short by turns, and not at the same steps."""
    longer = [*examples, as_example([1, 5], [150, *[7] * 30, 2], [250, 2])]
    settings: Any = {"batch_size": 2, "num_seen": 60, "start": 2, "stop": 30}
    steps = list(batches_of_seeds(longer, seeds=(3, 4), seed=3, **settings))
    shapes = {one.tokens.shape for one in batches(longer, seed=3, **settings)}
    for number, seed in enumerate((3, 4)):
        alone = counted_batches(longer, seed=seed, **settings)
        for some, (num_tokens, batch) in zip(steps, alone, strict=True):
            assert some[number][0] == num_tokens
            assert numbers(some[number][1]) == numbers(batch)
            assert some[number][1].tokens.shape == some[0][1].tokens.shape
    found = {some[0][1].tokens.shape for some in steps}
    assert found == shapes and len(shapes) > 1


def test_devices_and_microbatches_do_not_change_which_examples_share_a_batch(
    examples: list[Example],
):
    one, four = batches(examples), batches(examples, row_multiple=4)
    assert [numbers(batch) for batch in one] == [numbers(batch) for batch in four]
    assert {batch.tokens.shape[0] % 4 for batch in four} == {0}


def test_rows_have_the_length_that_is_asked_for(examples: list[Example]):
    shapes = {batch.tokens.shape for batch in batches(examples, row_length=77)}
    assert {length for _, length in shapes} == {77}
    with pytest.raises(ValueError, match="row_length is 9, but an example can take"):
        batches(examples, row_length=9)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 16])
def test_evaluation_covers_every_example_once(examples: list[Example], batch_size: int):
    found = list(evaluation_batches(examples, batch_size))
    assert sorted(order(found)) == list(range(10))
    assert len(found) <= -(-10 // batch_size)
    assert len({batch.tokens.shape for batch in found}) == 1


def test_packed_batches_say_where_each_example_is(examples: list[Example]):
    found = []
    for rows, batch in packed_batches(examples, batch_size=4, row_multiple=2):
        assert batch.tokens.shape[0] % 2 == 0
        for row, places in enumerate(rows):
            for slot, place in enumerate(places):
                lengths = [len(tokens) for tokens in examples[place].completions]
                assert batch.completion_length[row, slot].tolist() == lengths
            found += places
    assert sorted(found) == list(range(10))


def test_each_example_gets_another_completion_of_its_batch(examples: list[Example]):
    """KTO's mismatched completions: each serves once, none stays with its prompt."""
    plain = batches(examples, batch_size=5, num_seen=10, stop=2)
    mixed = batches(examples, batch_size=5, num_seen=10, stop=2, mismatch_within=64)
    for before, after in zip(plain, mixed, strict=True):
        own, other = (np.sort(after.completion_length[..., k], None) for k in (0, 1))
        first = np.sort(before.completion_length[..., 0], None)
        np.testing.assert_array_equal(own[-5:], first[-5:])
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("longest", [14, 20])
def test_mismatched_completions_fit_whichever_an_example_gets(
    examples: list[Example], longest: int
):
    """Cut to fourteen tokens with the prompt, or whole; over ten epochs."""
    alone = [
        example._replace(completions=example.completions[:1]) for example in examples
    ]
    settings = {"batch_size": 5, "num_seen": 100, "stop": 20}
    for batch in batches(alone, **settings, mismatch_within=longest):
        lengths = batch.completion_length[batch.live]
        assert len(lengths) == 5 and lengths.min() > 0
        assert lengths[:, 1].max() <= longest - 2


def test_the_fingerprint_is_that_of_the_tokens(examples: list[Example]):
    copies = [
        Example(example.prompt.copy(), tuple(map(np.copy, example.completions)))
        for example in examples
    ]
    assert fingerprint(copies) == fingerprint(examples)


@pytest.mark.parametrize(
    "other",
    [
        [as_example([1, 6], [7, 8, 2], [9, 2])],  # a token of the prompt
        [as_example([1, 5], [7, 8, 3], [9, 2])],  # a token of a completion
        [as_example([1], [5, 7, 8, 2], [9, 2])],  # the end of the prompt
        [as_example([1, 5], [7, 8], [2, 9, 2])],  # the end of a completion
        [as_example([1, 5], [9, 2], [7, 8, 2])],  # which is chosen
        [as_example([1, 5], [7, 8, 2, 9, 2])],  # the number of completions
        [as_example([1, 5], [7, 8, 2], [9, 2])] * 2,  # the number of examples
        [],
    ],
)
def test_the_fingerprint_changes_with_any_token_or_boundary(other: list[Example]):
    assert fingerprint([as_example([1, 5], [7, 8, 2], [9, 2])]) != fingerprint(other)


@pytest.mark.parametrize(
    "said",
    [
        {"scores": (2.0, 1.0)},
        {"weight": 0.5},
        {"masks": (np.array([True, False, True]), np.array([True, True]))},
        {"masks": (np.array([False, True, True]), np.array([True, True]))},
    ],
)
def test_the_fingerprint_changes_with_what_is_said_of_an_example(said: dict):
    example = as_example([1, 5], [7, 8, 2], [9, 2])
    assert fingerprint([example]) != fingerprint([example._replace(**said)])
    if "masks" in said:
        other = tuple(~mask for mask in said["masks"])
        assert fingerprint([example._replace(masks=other)]) != fingerprint(
            [example._replace(**said)]
        )


def test_the_fingerprint_tells_prompts_from_completions():
    pair = [as_example([1, 5], [7, 2], [9, 2])]
    singles = [as_example([1, 5], [7, 2]), as_example([9, 2])]
    others = [as_example([1, 5]), as_example([7, 2], [9, 2])]
    assert len({fingerprint(data) for data in (pair, singles, others)}) == 3
