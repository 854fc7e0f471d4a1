"""From token ids to rows: the layout of `dpojax.batch`, built on the host.

This file knows neither text nor where examples come from.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dpojax.batch import Batch

Tokens = Int[np.ndarray, " tokens"]
MAX_SLOTS = 16  # the most examples that `pack` puts into a row


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


def row_length(example: Example) -> int:
    """Positions that an example takes: ``P - 1 + sum(n_k)``."""
    return len(example.prompt) - 1 + sum(len(tokens) for tokens in example.completions)


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


def choose_row_length(examples: Sequence[Example]) -> int:
    """Positions of the rows of a data set: what its longest example needs.

    Longer rows could leave less padding, but attention costs their length squared.
    """
    return bucket_length(max(map(row_length, examples)))


def pack(
    examples: Sequence[Example],
    length: int,
    row_multiple: int = 1,
    num_completions: int | None = None,
) -> Batch:
    """Lays examples out in as few rows as first-fit decreasing needs.

    Args:
      examples: what the batch holds.
      length: positions of a row; no example is longer.
      row_multiple: the number of rows is a multiple of this, and of few values beside
        it, so that a run compiles a handful of programs.
      num_completions: the most completions of an example, of the whole data set so that
        all its batches have one shape; by default of these examples.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    most = min(len(examples), MAX_SLOTS)
    for example in sorted(examples, key=row_length, reverse=True):
        needed = row_length(example)
        fits = (r for r, free in enumerate(room) if free >= needed)
        row = next((r for r in fits if len(rows[r]) < most), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(example)
        room[row] -= needed
    count = row_multiple * bucket_length(-(-len(rows) // row_multiple), smallest=1)
    rows += [[] for _ in range(count - len(rows))]
    if num_completions is None:
        num_completions = most_completions(examples)
    return as_batch(
        rows, length=length, num_slots=most, num_completions=num_completions
    )


def most_completions(examples: Sequence[Example]) -> int:
    """The most completions that an example has."""
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
    prompts = [example.prompt.tobytes() for example in examples]

    def num_own(shift: int) -> int:
        return sum(prompts[i] == prompts[i - shift] for i in range(count))

    shift = min(range(1, count), key=num_own)
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


def as_batch(
    rows: Sequence[Sequence[Example]],
    *,
    length: int,
    num_slots: int = 1,
    num_completions: int = 2,
) -> Batch:
    """Lays examples out in rows.

    Args:
      rows: the examples of each row, in order; a row may be empty.
      length: positions of a row.
      num_slots: the most examples of a row.
      num_completions: the most completions of an example.

    Returns:
      The batch, as NumPy arrays, int32 and float32.

    Raises:
      ValueError: if a row's examples do not fit.
    """
    shape = (len(rows), length)
    tokens, labels, position, example, branch = np.zeros((5, *shape), np.int32)
    slots = (len(rows), num_slots)
    lengths = np.zeros((*slots, num_completions), np.int32)
    scores = np.zeros(lengths.shape, np.float32)
    weights = np.zeros(slots, np.float32)
    for row, examples in enumerate(rows):
        needed = sum(map(row_length, examples))
        if needed > length or len(examples) > num_slots:
            raise ValueError(
                f"Row {row} holds {len(examples)} examples of {needed} positions; "
                f"it has {num_slots} slots and {length} positions."
            )
        start = 0
        for slot, packed in enumerate(examples):
            weights[row, slot] = packed.weight
            if packed.scores is not None:
                scores[row, slot, : len(packed.scores)] = packed.scores
            for number, inputs, targets in _segments(packed):
                here = slice(start, start + len(inputs))
                first = 0 if number == 0 else len(packed.prompt) - 1
                tokens[row, here], labels[row, here] = inputs, targets
                position[row, here] = np.arange(first, first + len(inputs))
                example[row, here], branch[row, here] = slot + 1, number
                if number:
                    lengths[row, slot, number - 1] = np.count_nonzero(targets >= 0)
                start = here.stop
    wholes = [[packed.reference for packed in some] for some in rows]
    prefixes = [[packed.reference_prefix for packed in some] for some in rows]
    known = _known_numbers(wholes, lengths), _known_numbers(prefixes, lengths)
    arrays = (tokens, labels, position, example, branch, lengths, scores, weights)
    return Batch(*arrays, *known)


def _known_numbers(
    rows: Sequence[Sequence[tuple[float, ...] | None]], like: np.ndarray
) -> np.ndarray | None:
    """Numbers of completions in the places of `like`; None where no example has any.

    Raises:
      ValueError: if some examples have them and others do not.
    """
    is_known = [numbers is not None for row in rows for numbers in row]
    if not any(is_known):
        return None
    if not all(is_known):
        raise ValueError(
            f"{sum(is_known)} of {len(is_known)} examples of a batch come with the "
            "reference's log-probabilities; give them for all or for none."
        )
    array = np.zeros(like.shape, np.float32)
    for row, examples in enumerate(rows):
        for slot, numbers in enumerate(examples):
            if numbers is not None:
                array[row, slot, : len(numbers)] = numbers
    return array


def _segments(example: Example) -> Iterator[tuple[int, Tokens, Tokens]]:
    """Branch number, inputs and labels: the prompt's, then each completion's."""
    prompt = example.prompt
    yield 0, prompt[:-1], np.zeros(len(prompt) - 1, np.int32)
    for index, completion in enumerate(example.completions):
        labels = completion
        if example.masks is not None:
            labels = np.where(example.masks[index], completion, -1)
        yield index + 1, np.concatenate([prompt[-1:], completion[:-1]]), labels
