"""From token ids to rows: the layout of `dpojax.batch`, built on the host.

This file knows neither text nor where examples come from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dpojax.batch import Batch

Tokens = Int[np.ndarray, " tokens"]


class Example(NamedTuple):
    """A prompt of at least one token, and its completions."""

    prompt: Tokens
    completions: tuple[Tokens, ...]


def row_length(example: Example) -> int:
    """Positions that an example takes: ``P - 1 + sum(n_k)``."""
    return len(example.prompt) - 1 + sum(len(tokens) for tokens in example.completions)


def bucket_length(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length`.

    A run compiles once per bucket; the steps of at most one half keep both the number
    of programs and the padding small.
    """
    bucket = 16
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


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
      The batch, as NumPy int32 arrays.

    Raises:
      ValueError: if a row's examples do not fit.
    """
    shape = (len(rows), length)
    tokens, labels, position, example, branch = np.zeros((5, *shape), np.int32)
    lengths = np.zeros((len(rows), num_slots, num_completions), np.int32)
    for row, examples in enumerate(rows):
        needed = sum(map(row_length, examples))
        if needed > length or len(examples) > num_slots:
            raise ValueError(
                f"Row {row} holds {len(examples)} examples of {needed} positions; "
                f"it has {num_slots} slots and {length} positions."
            )
        start = 0
        for slot, (prompt, completions) in enumerate(examples):
            segments = [(0, prompt[:-1], np.zeros(len(prompt) - 1, np.int32))]
            for k, completion in enumerate(completions, start=1):
                inputs = np.concatenate([prompt[-1:], completion[:-1]])
                segments.append((k, inputs, completion))
                lengths[row, slot, k - 1] = len(completion)
            for number, inputs, targets in segments:
                here = slice(start, start + len(inputs))
                first = 0 if number == 0 else len(prompt) - 1
                tokens[row, here], labels[row, here] = inputs, targets
                position[row, here] = np.arange(first, first + len(inputs))
                example[row, here], branch[row, here] = slot + 1, number
                start = here.stop
    return Batch(tokens, labels, position, example, branch, lengths)
