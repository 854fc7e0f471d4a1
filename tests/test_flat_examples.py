"""Examples as flat arrays are the examples that were put in, in memory and in files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data.flat_examples import ExampleWriter, FlatExamples, map_examples
from dpojax.data.loader import fingerprint, training_batches
from dpojax.data.packing import Example, most_completions, row_lengths


def as_example(
    prompt: list[int],
    *completions: list[int],
    scores: tuple[float, ...] | None = None,
    weight: float = 1.0,
    is_masked: bool = False,
) -> Example:
    tokens = tuple(np.array(completion, np.int32) for completion in completions)
    masks = tuple(some % 2 == 0 for some in tokens) if is_masked else None
    return Example(np.array(prompt, np.int32), tokens, scores, weight, masks)


EXAMPLES = [
    as_example([1, 5], [7, 8, 2], [9, 2]),
    as_example([1], [7, 2], scores=(1.0,), weight=0.25),
    as_example([1, 5, 6], [8, 2], [9, 2], [4, 4, 4, 2], scores=(3.0, 0.1, -2.0)),
    as_example([1, 3], [7, 8, 2], [9, 2], is_masked=True),
    as_example([1, 2], [6, 8, 2], [5, 2], is_masked=True, scores=(0.5, 0.0)),
    as_example([2], [3, 2], [4, 2]),
]


def flat(examples: list[Example], directory: Path | None = None) -> FlatExamples:
    writer = ExampleWriter(directory)
    for example in examples:
        writer.append(example)
    return writer.finish()


def assert_same(found: Example, expected: Example) -> None:
    assert found.prompt.dtype == np.int32
    assert found.prompt.tolist() == expected.prompt.tolist()
    for one, other in (
        (found.completions, expected.completions),
        (found.masks or (), expected.masks or ()),
    ):
        assert [x.tolist() for x in one] == [x.tolist() for x in other]
        assert [x.dtype for x in one] == [x.dtype for x in other]
    assert (found.masks is None) == (expected.masks is None)
    assert repr(found[2:4]) == repr(expected[2:4])  # as Python's own floats


@pytest.fixture(params=["memory", "files"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path


def test_every_example_is_what_was_put_in(directory: Path | None):
    found = flat(EXAMPLES, directory)
    assert len(found) == len(EXAMPLES)
    for example, expected in zip(found, EXAMPLES, strict=True):
        assert_same(example, expected)
    assert_same(found[-2], EXAMPLES[-2])
    for example, expected in zip(found[4:1:-1], EXAMPLES[4:1:-1], strict=True):
        assert_same(example, expected)
    with pytest.raises(IndexError):
        found[len(EXAMPLES)]


def test_files_hold_the_same_once_more(tmp_path: Path):
    written = flat(EXAMPLES, tmp_path)
    found = map_examples(tmp_path, written.fingerprint)
    assert fingerprint(list(found)) == fingerprint(EXAMPLES)


def test_what_is_known_without_the_tokens_is_what_they_say(directory: Path | None):
    found = flat(EXAMPLES, directory)
    assert row_lengths(found).tolist() == row_lengths(EXAMPLES).tolist()
    assert most_completions(found) == most_completions(EXAMPLES) == 3
    assert fingerprint(found) == fingerprint(EXAMPLES)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4),
            st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1),
            st.booleans(),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_examples_come_out_as_they_went_in(drawn: list[tuple]):
    examples = [
        as_example(
            prompt,
            *completions,
            scores=tuple(range(len(completions))) if has_scores else None,
            is_masked=is_masked,
        )
        for prompt, completions, has_scores, is_masked in drawn
    ]
    found = flat(examples)
    assert row_lengths(found).tolist() == row_lengths(examples).tolist()
    for example, expected in zip(found, examples, strict=True):
        assert example.prompt.tolist() == expected.prompt.tolist()
        assert example.scores == expected.scores
        for name in ("completions", "masks"):
            parts = example._asdict()[name], expected._asdict()[name]
            assert repr(parts[0]) == repr(parts[1])


def test_many_examples_are_put_away_in_pieces(
    directory: Path | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dpojax.data.flat_examples._TOGETHER", 4)
    found = flat(EXAMPLES * 3, directory)
    assert fingerprint(list(found)) == fingerprint(EXAMPLES * 3)


def test_batches_are_those_of_a_list_of_the_same_examples(directory: Path | None):
    examples = [example for example in EXAMPLES if len(example.completions) == 2] * 8
    settings = {"batch_size": 6, "num_seen": 48, "seed": 3, "start": 0, "stop": 8}
    found, expected = (
        list(training_batches(some, **settings))
        for some in (flat(examples, directory), examples)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_equal(one._asdict(), other._asdict())
