"""Batches as a function of seed and step; Grain prepares them ahead.

Which examples share a batch is `dpojax.data.order`'s concern, and which share a row
`dpojax.data.plan`'s. The number of the step is the whole state of the data: resuming
needs nothing else. This file knows neither text nor devices.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from dpojax.batch import Batch
from dpojax.data.flat_examples import Fingerprint, FlatExamples
from dpojax.data.order import WINDOW, Places, make_order
from dpojax.data.packing import (
    Example,
    OwnRows,
    as_batch,
    every_row,
    most_completions,
    pack,
    pack_alike,
    row_lengths,
    with_mismatched,
)
from dpojax.data.plan import (
    Lengths,
    Rows,
    Shape,
    choose_shape,
    fill_shape,
    pack_rows,
    round_up,
)

# By so many examples, of so many batches, the shape of a run is chosen.
_SEEN_FIRST, _MOST_BATCHES = 4_096, 32


def training_batches(examples: Sequence[Example], **settings: Any) -> Iterator[Batch]:
    """The batches of `counted_batches`, which takes the same, without their counts."""
    for _, batch in counted_batches(examples, **settings):
        yield batch


def counted_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    num_seen: int,
    seed: int,
    start: int,
    stop: int,
    row_multiple: int = 1,
    row_length: int | None = None,
    window: int = WINDOW,
    mismatch_within: int | None = None,
    own_rows: OwnRows = every_row,
) -> Iterator[tuple[int, Batch]]:
    """The batches of the steps ``start, ..., stop - 1``, prepared in the background.

    Every process plans all rows, by their lengths alone, and lays out its own.

    Args:
      examples: the whole data set.
      batch_size: examples of a batch.
      num_seen: examples that the whole run sees; its last batch may hold fewer.
      seed: decides the order of every epoch.
      start: first step.
      stop: one past the last step.
      row_multiple: the number of rows is a multiple of this.
      row_length: positions of a row; None: what wastes least.
      window: about so many examples are dealt to batches at one time.
      mismatch_within: given, each example gets another completion of its batch as its
        second, which may have so many tokens with the prompt.
      own_rows: which rows of a batch are laid out here.

    Yields:
      How many tokens a whole batch has, and the rows of it that are laid out here.

    Raises:
      ValueError: if an example does not fit into a row.
    """
    planned = _plan(
        examples,
        batch_size=batch_size,
        num_seen=num_seen,
        seed=seed,
        row_multiple=row_multiple,
        row_length=row_length,
        window=window,
        mismatch_within=mismatch_within,
    )

    def make(step: int) -> tuple[int, Batch]:
        batch = planned.examples_of(step)
        num_tokens = int(row_lengths(batch).sum())
        return num_tokens, pack(batch, planned.shape, planned.num_completions, own_rows)

    return _ahead(make, start, stop)


def batches_of_seeds(
    examples: Sequence[Example],
    *,
    seeds: Sequence[int],
    start: int,
    stop: int,
    **settings: Any,
) -> Iterator[list[tuple[int, Batch]]]:
    """The batches of `counted_batches` of several seeds, step by step together.

    Args:
      examples: the whole data set.
      seeds: one for each batch of a step.
      start: first step.
      stop: one past the last step.
      **settings: what `counted_batches` takes besides. The batches of its own seed
        decide the shape: whatever the others are, no more programs are compiled.

    Yields:
      Of each seed how many tokens its batch has, and the batch; all have one shape.
    """
    shape = _plan(examples, **settings).shape
    plans = [_plan(examples, **settings | {"seed": s, "shape": shape}) for s in seeds]

    def make(step: int) -> list[tuple[int, Batch]]:
        some = [planned.examples_of(step) for planned in plans]
        counts = [int(row_lengths(batch).sum()) for batch in some]
        packed = pack_alike(some, shape, plans[0].num_completions)
        return list(zip(counts, packed, strict=True))

    return _ahead(make, start, stop)


def locate(examples: Sequence[Example], step: int, **settings: Any) -> Rows:
    """Which examples are in the slots of each row of a step's batch.

    Args:
      examples: the whole data set.
      step: the number that `counted_batches` begins to count at for this batch.
      **settings: what `counted_batches` takes besides.
    """
    planned = _plan(examples, **settings)
    rows, _ = fill_shape(row_lengths(planned.examples_of(step)), planned.shape)
    numbers = planned.numbers_of(step).tolist()
    return [[numbers[place] for place in row] for row in rows]


def evaluation_batches(
    examples: Sequence[Example], batch_size: int, row_multiple: int = 1
) -> Iterator[Batch]:
    """Every example once, in batches of one shape; see `packed_batches`."""
    for _, batch in packed_batches(examples, batch_size, row_multiple):
        yield batch


def packed_batches(
    examples: Sequence[Example], batch_size: int, row_multiple: int = 1
) -> Iterator[tuple[Rows, Batch]]:
    """Every example once, in batches of one shape, with where each of them is.

    Args:
      examples: what to go through.
      batch_size: examples of a batch, about: its rows are as many as these need.
      row_multiple: the number of rows is a multiple of this.

    Yields:
      Rows, each the places of its examples, which stand in its slots in that order;
      and the batch. Its last rows may be empty.
    """
    lengths = row_lengths(examples)
    some = lengths[:: -(-len(lengths) // _SEEN_FIRST)]
    shape = choose_shape([some], longest=int(lengths.max()))
    rows = pack_rows(lengths, shape.row_length, shape.num_slots)
    # Losses that look at a whole batch see short and long examples in it, mixed.
    rows = [rows[row] for row in np.random.default_rng(0).permutation(len(rows))]
    num_batches = -(-len(examples) // batch_size)
    num_rows = round_up(-(-len(rows) // num_batches), row_multiple)
    for start in range(0, len(rows), num_rows):
        part = rows[start : start + num_rows]
        filled = [[examples[place] for place in row] for row in part]
        yield (
            part,
            as_batch(
                filled + [[]] * (num_rows - len(part)),
                length=shape.row_length,
                num_slots=shape.num_slots,
                num_completions=most_completions(examples),
            ),
        )


class _Planned(NamedTuple):
    """Everything about the batches of a run but their layout."""

    numbers_of: Callable[[int], Places]  # step -> which examples its batch has
    examples_of: Callable[[int], list[Example]]  # these, as the batch has them
    shape: Shape
    num_completions: int


def _plan(
    examples: Sequence[Example],
    *,
    batch_size: int,
    num_seen: int,
    seed: int,
    row_multiple: int = 1,
    row_length: int | None = None,
    window: int = WINDOW,
    mismatch_within: int | None = None,
    shape: Shape | None = None,
) -> _Planned:
    lengths, most = _planned_lengths(examples, mismatch_within)
    order = make_order(
        lengths, batch_size=batch_size, seed=seed, window=window, row_length=row_length
    )

    def numbers_of(step: int) -> Places:
        return order(range(step * batch_size, min((step + 1) * batch_size, num_seen)))

    def examples_of(step: int) -> list[Example]:
        batch = [examples[number] for number in numbers_of(step)]
        if mismatch_within is not None:
            batch = with_mismatched(batch, mismatch_within)
        return batch

    if shape is None:
        some = _first_steps(min(len(examples), num_seen), batch_size)
        shape = choose_shape(
            [row_lengths(examples_of(step)) for step in some],
            longest=int(most.max()),
            row_multiple=row_multiple,
            row_length=row_length,
        )
    num_completions = most_completions(examples) if mismatch_within is None else 2
    return _Planned(numbers_of, examples_of, shape, num_completions)


def _ahead(make: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
    """What is made of each step, prepared in the background."""
    steps = grain.MapDataset.range(start, stop).map(make)
    return iter(steps.to_iter_dataset(grain.ReadOptions(1, prefetch_buffer_size=4)))


def _first_steps(num_examples: int, batch_size: int) -> list[int]:
    """Some steps of the first epoch, whole batches where it has any."""
    whole = max(1, num_examples // batch_size)
    count = min(whole, _MOST_BATCHES, max(2, _SEEN_FIRST // batch_size))
    return np.linspace(0, whole - 1, count).astype(int).tolist()


def _planned_lengths(
    examples: Sequence[Example], mismatch_within: int | None
) -> tuple[Lengths, Lengths]:
    """Positions by which examples are dealt, and the most that each can take.

    With mismatched completions, a batch has as many positions as if each example had
    its own completion twice.
    """
    lengths = row_lengths(examples)
    if mismatch_within is None:
        return lengths, lengths
    own = np.array([len(example.completions[0]) for example in examples])
    room = mismatch_within - np.array([len(example.prompt) for example in examples])
    return lengths + own, lengths + np.minimum(own.max(), room)


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of every token id and boundary, and of what was said of each example."""
    if isinstance(examples, FlatExamples):
        return examples.fingerprint
    fingerprint = Fingerprint()
    for example in examples:
        fingerprint.add(example)
    return fingerprint.hexdigest()
