"""From token ids to rows: the layout of `dpojax.batch`, built on the host.

This file knows neither text nor where examples come from, nor why they share a row.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dpojax.batch import Batch
from dpojax.data.plan import Lengths, Shape, fill_alike, fill_shape

Tokens = Int[np.ndarray, " tokens"]
# Of so many rows of a batch, the numbers of those that are needed here.
OwnRows = Callable[[int], Iterable[int]]


class Example(NamedTuple):
    """A prompt of at least one token, its completions, and what was said of them."""

    prompt: Tokens
    completions: tuple[Tokens, ...]
    scores: tuple[float, ...] | None = None  # ratings, or 1 for good and 0 for bad
    weight: float = 1.0  # how much the example counts
    # Which tokens of each completion are scored; None: all of them.
    masks: tuple[Bool[np.ndarray, " tokens"], ...] | None = None
    # Of each completion, where they are known beforehand: see `Batch.reference`.
    reference: tuple[float, ...] | None = None
    reference_prefix: tuple[float, ...] | None = None


class MeasuredExamples(Sequence[Example]):
    """Examples whose sizes are known without looking at each of them."""

    @abstractmethod
    def row_lengths(self) -> Lengths:
        """Positions that each example takes, see `row_length`."""

    @abstractmethod
    def most_completions(self) -> int:
        """The most completions that an example has."""


def every_row(num_rows: int) -> Iterable[int]:
    """The `OwnRows` of a process that is alone."""
    return range(num_rows)


def row_length(example: Example) -> int:
    """Positions that an example takes: ``P - 1 + sum(n_k)``."""
    return len(example.prompt) - 1 + sum(map(len, example.completions))


def row_lengths(examples: Sequence[Example]) -> Lengths:
    """Positions that each example takes."""
    if isinstance(examples, MeasuredExamples):
        return examples.row_lengths()
    return np.array([row_length(example) for example in examples], int)


def end_as_input(example: Example, padding: int | None = None) -> Example:
    """Makes each completion's last token an input, where a reward model is read.

    A branch's inputs are its completion without the last token. So that token is
    repeated; the copy is not scored: lengths and log-probabilities stay as they are.

    Args:
      example: a prompt and its completions.
      padding: the model's padding token. `transformers` reads a score at the last token
        that is not padding; so a completion that ends with it, as it does where
        padding and EOS are one token, stays as it is and is read before its end.
    """
    completions, masks = [], []
    for index, tokens in enumerate(example.completions):
        scored = np.ones(len(tokens), bool)
        mask = scored if example.masks is None else example.masks[index]
        if tokens[-1] != padding:
            tokens, mask = np.append(tokens, tokens[-1]), np.append(mask, False)
        completions.append(tokens)
        masks.append(mask)
    return example._replace(completions=tuple(completions), masks=tuple(masks))


def bucket_length(length: int, smallest: int = 16) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, ... from `smallest` on that holds `length`.

    A run compiles once per bucket; steps of at most one half keep both the number of
    programs and the padding small.
    """
    power = 1 << (max(length, smallest) - 1).bit_length()
    three_quarters = power * 3 // 4
    fits = power >= 4 and three_quarters >= max(length, smallest)
    return three_quarters if fits else power


def pack(
    examples: Sequence[Example],
    shape: Shape,
    num_completions: int | None = None,
    own_rows: OwnRows = every_row,
) -> Batch:
    """Lays examples out in as few rows as they need, of a shape that the run compiles.

    Args:
      examples: what the batch holds.
      shape: of the run; no example is longer than its rows.
      num_completions: the most completions of an example, of the whole data set so that
        all its batches have one shape; by default of these examples.
      own_rows: which of the rows are laid out, where others are another process's.
    """
    rows, length = fill_shape(row_lengths(examples), shape)
    if num_completions is None:
        num_completions = most_completions(examples)
    return as_batch(
        [[examples[place] for place in row] for row in rows],
        length=length,
        num_slots=shape.num_slots,
        num_completions=num_completions,
        own_rows=own_rows,
    )


def pack_alike(
    batches: Sequence[Sequence[Example]], shape: Shape, num_completions: int
) -> list[Batch]:
    """Lays several batches out as `pack` does one, in as many rows each, of one length.

    Args:
      batches: the examples of each.
      shape: of the run.
      num_completions: the most completions of an example.
    """
    filled, length = fill_alike([row_lengths(examples) for examples in batches], shape)
    return [
        as_batch(
            [[examples[place] for place in row] for row in rows],
            length=length,
            num_slots=shape.num_slots,
            num_completions=num_completions,
        )
        for examples, rows in zip(batches, filled, strict=True)
    ]


def most_completions(examples: Sequence[Example]) -> int:
    """The most completions that an example has."""
    if isinstance(examples, MeasuredExamples):
        return examples.most_completions()
    return max(len(example.completions) for example in examples)


def with_mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Gives each example another one's completion as its second: what KTO's z0 needs.

    Completions move on by a fixed number of places, so that each serves once; of all
    numbers by the first that leaves the fewest examples with a completion of their own
    prompt. What would exceed `max_length` with the prompt is cut off.

    Raises:
      ValueError: if there is only one example.
    """
    count = len(examples)
    if count < 2:
        raise ValueError(
            "This loss compares each example with another of its batch; give batches "
            "of at least two."
        )
    shift = _best_shift([example.prompt.tobytes() for example in examples])
    mixed = []
    for place, example in enumerate(examples):
        other, room = examples[place - shift], max_length - len(example.prompt)
        completions = (example.completions[0], other.completions[0][:room])
        masks = [
            np.ones(len(whole), bool) if one.masks is None else one.masks[0]
            for one, whole in ((example, completions[0]), (other, completions[1]))
        ]
        cut = masks[0], masks[1][:room]
        # What is known beforehand is of other completions.
        changed = example._replace(reference=None, reference_prefix=None)
        mixed.append(changed._replace(completions=completions, masks=cut))
    return mixed


def _best_shift(prompts: Sequence[bytes]) -> int:
    """Places by which to move completions so that the fewest keep their prompt."""
    numbers = np.unique(prompts, return_inverse=True)[1]
    best, fewest = 1, len(prompts) + 1
    for shift in range(1, len(prompts)):
        num_own = np.count_nonzero(numbers == np.roll(numbers, shift))
        if num_own < fewest:
            best, fewest = shift, num_own
        if fewest == 0:
            break
    return best


def as_batch(
    rows: Sequence[Sequence[Example]],
    *,
    length: int,
    num_slots: int = 1,
    num_completions: int = 2,
    own_rows: OwnRows = every_row,
) -> Batch:
    """Lays examples out in rows.

    Args:
      rows: the examples of each row, in order; a row may be empty.
      length: positions of a row.
      num_slots: the most examples of a row.
      num_completions: the most completions of an example.
      own_rows: which of the rows are laid out.

    Returns:
      The batch of these rows, as NumPy arrays, int32 and float32.

    Raises:
      ValueError: if a row's examples do not fit.
    """
    for row, examples in enumerate(rows):
        needed = sum(map(row_length, examples))
        if needed > length or len(examples) > num_slots:
            raise ValueError(
                f"Row {row} holds {len(examples)} examples of {needed} positions; "
                f"it has {num_slots} slots and {length} positions."
            )
    is_known = [_are_known(rows, name) for name in ("reference", "reference_prefix")]
    rows = [rows[row] for row in own_rows(len(rows))]
    laid_out, used = _lay_out(rows)
    arrays = np.zeros((5, len(rows), length), np.int32)
    arrays[:, np.arange(length) < used[:, None]] = laid_out
    tokens, labels, position, example, branch = arrays
    lengths = np.zeros((len(rows), num_slots, num_completions), np.int32)
    scores = np.zeros(lengths.shape, np.float32)
    weights = np.zeros(lengths.shape[:2], np.float32)
    for row, examples in enumerate(rows):
        for slot, packed in enumerate(examples):
            weights[row, slot] = packed.weight
            parts = packed.completions if packed.masks is None else packed.masks
            count = len if packed.masks is None else np.count_nonzero
            lengths[row, slot, : len(parts)] = [count(part) for part in parts]
            if packed.scores is not None:
                scores[row, slot, : len(packed.scores)] = packed.scores
    wholes = [[packed.reference for packed in some] for some in rows]
    prefixes = [[packed.reference_prefix for packed in some] for some in rows]
    known = [
        _known_numbers(numbers, lengths) if are_known else None
        for numbers, are_known in zip((wholes, prefixes), is_known, strict=True)
    ]
    sums = (lengths, scores, weights)
    return Batch(tokens, labels, position, example, branch, *sums, *known)


def _are_known(rows: Sequence[Sequence[Example]], name: str) -> bool:
    """Whether examples bring a reference's numbers along.

    Raises:
      ValueError: if some do and others do not.
    """
    number = attrgetter(name)
    is_known = [number(example) is not None for row in rows for example in row]
    if any(is_known) and not all(is_known):
        raise ValueError(
            f"{sum(is_known)} of {len(is_known)} examples of a batch come with the "
            "reference's log-probabilities; give them for all or for none."
        )
    return any(is_known)


def _known_numbers(
    rows: Sequence[Sequence[tuple[float, ...] | None]], like: np.ndarray
) -> np.ndarray:
    """Numbers of completions in the places of `like`."""
    array = np.zeros(like.shape, np.float32)
    for row, examples in enumerate(rows):
        for slot, numbers in enumerate(examples):
            if numbers is not None:
                array[row, slot, : len(numbers)] = numbers
    return array


def _lay_out(
    rows: Sequence[Sequence[Example]],
) -> tuple[Int[np.ndarray, "5 positions"], Int[np.ndarray, " rows"]]:
    """Tokens, labels, position, example and branch of all rows, one after another.

    Returns:
      These, without padding, and how many of them each row has.
    """
    inputs, labels, sizes, firsts, numbers, branches = [], [], [], [], [], []
    used = np.zeros(len(rows), int)
    for row, examples in enumerate(rows):
        for slot, example in enumerate(examples):
            used[row] += row_length(example)
            for branch, tokens, targets in _segments(example):
                inputs += tokens
                labels.append(targets)
                sizes.append(len(targets))
                firsts.append(len(example.prompt) - 1 if branch else 0)
                numbers.append(slot + 1)
                branches.append(branch)
    lengths = np.array(sizes, int)
    starts = np.cumsum(lengths) - lengths
    of_segments = np.array([firsts - starts, numbers, branches], int)
    shifts, example, branch = np.repeat(of_segments, lengths, axis=1)
    none = np.zeros(0, np.int32)
    tokens, targets = (np.concatenate([none, *parts]) for parts in (inputs, labels))
    position = np.arange(len(tokens)) + shifts
    return np.stack([tokens, targets, position, example, branch]), used


def _segments(example: Example) -> Iterator[tuple[int, tuple[Tokens, ...], Tokens]]:
    """Branch number, inputs in parts and labels: the prompt's, each completion's."""
    prompt = example.prompt
    before, last = prompt[:-1], prompt[-1:]
    yield 0, (before,), np.zeros_like(before)
    for index, completion in enumerate(example.completions):
        labels = completion
        if example.masks is not None:
            labels = np.where(example.masks[index], completion, -1)
        yield index + 1, (last, completion[:-1]), labels
