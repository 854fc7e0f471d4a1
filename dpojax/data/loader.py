"""Batches as a function of seed and step; Grain prepares them ahead.

An epoch is a permutation of the examples drawn from (seed, epoch); batches follow one
another through it without a gap, and each is packed into few rows. The number of the
step is the whole state of the data: resuming needs nothing else. This file knows
neither text nor devices.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import grain
import numpy as np

from dpojax.batch import Batch
from dpojax.data.packing import (
    Example,
    bucket_length,
    choose_row_length,
    most_completions,
    pack,
    row_length,
    with_mismatched,
)


def training_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    num_seen: int,
    seed: int,
    start: int,
    stop: int,
    row_multiple: int = 1,
    mismatch_within: int | None = None,
) -> Iterator[Batch]:
    """The batches of the steps ``start, ..., stop - 1``, prepared in the background.

    Args:
      examples: the whole data set.
      batch_size: examples of a batch.
      num_seen: examples that the whole run sees; its last batch may hold fewer.
      seed: decides the order of every epoch.
      start: first step.
      stop: one past the last step.
      row_multiple: the number of rows is a multiple of this.
      mismatch_within: given, each example gets another completion of its batch as its
        second, which may have so many tokens with the prompt.
    """
    num_completions = most_completions(examples)
    length = choose_row_length(examples)
    if mismatch_within is not None:
        length, num_completions = (
            bucket_length(
                max(map(row_length, examples))
                + max(len(example.completions[0]) for example in examples)
            ),
            2,
        )

    def at(step: int) -> Batch:
        places = range(step * batch_size, min((step + 1) * batch_size, num_seen))
        chosen = [_example_at(place, len(examples), seed) for place in places]
        batch = [examples[index] for index in chosen]
        if mismatch_within is not None:
            batch = with_mismatched(batch, mismatch_within)
        return pack(batch, length, row_multiple, num_completions)

    steps = grain.MapDataset.range(start, stop).map(at)
    return iter(steps.to_iter_dataset(grain.ReadOptions(1, prefetch_buffer_size=4)))


def evaluation_batches(
    examples: Sequence[Example], batch_size: int, row_multiple: int = 1
) -> Iterator[Batch]:
    """Every example once, in rows of one length, so that few programs are compiled."""
    length, num_completions = choose_row_length(examples), most_completions(examples)
    for start in range(0, len(examples), batch_size):
        some = examples[start : start + batch_size]
        yield pack(some, length, row_multiple, num_completions)


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of every token id and boundary, and of what was said of each example."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.int64(len(example.completions)).tobytes())
        for tokens in (example.prompt, *example.completions):
            digest.update(np.int64(len(tokens)).tobytes() + tokens.tobytes())
        digest.update(repr((example.scores, example.weight)).encode())
        for mask in example.masks or ():
            digest.update(mask.tobytes())
    return digest.hexdigest()


def _example_at(place: int, num_examples: int, seed: int) -> int:
    epoch, offset = divmod(place, num_examples)
    return int(_permutation(num_examples, seed, epoch)[offset])


@lru_cache(maxsize=2)  # a batch may span the end of one epoch and the next
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)
