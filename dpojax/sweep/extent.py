"""How many runs of a program are trained at one time, and which.

The runs of a program are all combinations of some settings, each with all seeds. This
file knows neither models nor data.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from dpojax.sweep.grouping import Trial

# Runs that are trained at one time: of each seed, those of the same combinations.
Block = list[list[Trial]]


class Extent(NamedTuple):
    """So many seeds, and so many runs of each."""

    seeds: int
    combinations: int

    @property
    def num_runs(self) -> int:
        """Of all these seeds."""
        return self.seeds * self.combinations


def extent_of(trials: Sequence[Trial]) -> Extent:
    """All runs of a program."""
    block = _as_block(trials)
    return Extent(len(block), len(block[0]))


def extents(whole: Extent, *, whole_seeds: bool = False) -> list[Extent]:
    """The equal parts into which runs can be divided, the fewest first.

    Args:
      whole: all runs.
      whole_seeds: which come first of as many parts: those with the fewest seeds, since
        the runs of one share its batches and so the reference's pass; or those with
        the most, so that dropping combinations leaves fewer parts.
    """
    sizes = [{math.ceil(n / parts) for parts in range(1, n + 1)} for n in whole]

    def order(extent: Extent) -> tuple[int, int]:
        pairs = zip(whole, extent, strict=True)
        number = math.prod(math.ceil(n / size) for n, size in pairs)
        return number, -extent.seeds if whole_seeds else extent.seeds

    return sorted((Extent(*some) for some in product(*sizes)), key=order)


def blocks(trials: Sequence[Trial], extent: Extent) -> list[Block]:
    """The runs of a program, or those left of them, by what is trained at one time."""
    block = _as_block(trials)
    return [
        [seed[columns] for seed in block[rows]]
        for rows in _parts(len(block), extent.seeds)
        for columns in _parts(len(block[0]), extent.combinations)
    ]


def _as_block(trials: Sequence[Trial]) -> Block:
    seeds: dict[int, list[Trial]] = {}
    for trial in trials:
        seeds.setdefault(trial.config.seed, []).append(trial)
    return list(seeds.values())


def _parts(number: int, most: int) -> Iterator[slice]:
    """As few equal parts as hold at most so many each."""
    size = math.ceil(number / math.ceil(number / most))
    for start in range(0, number, size):
        yield slice(start, start + size)
