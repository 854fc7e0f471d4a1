"""Which records of a data set a split has, and the records, each made at its turn.

Data without splits is cut here, the same way every time. This file knows neither how
rows are stored nor what they hold.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from dpojax.data.bad_records import BadRecord, BadRecords, usable
from dpojax.data.fields import Record, Row
from dpojax.data.files import Rows, checked_row, read_splits
from dpojax.data.formats import as_record, rename_columns
from dpojax.data.order import Places

# Of so many rows, the places of those that are chosen, in ascending order; several such
# passes are gone through one after another.
Choose = Callable[[int], list[Places]]

_MOST_TIMES = 1000  # that a record is repeated


class Selection:
    """Records of a data set, each made when it is its turn."""

    def __init__(
        self,
        rows: Rows,
        choose: Choose,
        columns: Mapping[str, str],
        bad: BadRecords | None,
    ):
        """Reads nothing yet.

        Args:
          rows: of the data set.
          choose: which of the rows.
          columns: for a column's name in `dpojax.data.formats` its name in the data.
          bad: where bad records are noted; None: the first one stops, and what is no
            row stops wherever it is.
        """
        self._rows, self._choose = rows, choose
        self._columns, self._bad = columns, bad

    @property
    def files(self) -> list[Path]:
        """Where all contents of the rows are; empty if some of them are in no file."""
        return self._rows.files

    def weigh(self, weight: float) -> "Selection":
        """Repeats records or keeps a share of them, see `weigh_places`."""

        def choose(num_rows: int) -> list[Places]:
            (places,) = self._choose(num_rows)
            return [places[chosen] for chosen in weigh_places(len(places), weight)]

        return Selection(self._rows, choose, self._columns, self._bad)

    def __len__(self) -> int:
        """How many records there are."""
        return sum(map(len, self._passes))

    def __iter__(self) -> Iterator[Record]:
        """Reads the rows.

        Raises:
          ValueError: naming the line or the row of which no record can be made.
        """
        bad = self._bad
        if bad is not None:  # of several passes, the largest has all rows of the others
            bad.count(max(map(len, self._passes)))
        # One after another, but together: of a few that stand once more all may be bad.
        rows = (
            row
            for places in self._passes
            for row in self._rows.read(places.tolist(), all_checked=bad is None)
        )
        yield from usable(self._record, rows, bad)

    def _record(self, row: Row | BadRecord) -> Record:
        return as_record(rename_columns(checked_row(row), self._columns))

    @cached_property
    def _passes(self) -> list[Places]:
        return self._choose(len(self._rows))


def select(
    source: str,
    *,
    split: str,
    columns: Mapping[str, str] | None = None,
    test_size: float = 0.05,
    max_examples: int | None = None,
    bad: BadRecords | None = None,
) -> Selection:
    """The records of a split, as `dpojax.data.records.read_records` describes them."""
    if not 0 <= test_size < math.inf:
        raise ValueError(
            f"test_size is {test_size}; it must not be negative, but a number."
        )
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples is {max_examples}; it must be positive.")
    splits = read_splits(source)
    # A lone "train" is all there is: taken whole, it would hold the test split too.
    whole = splits.keys() not in ({None}, {"train"})
    if whole and split not in splits:
        raise ValueError(
            f"{source} has no split {split!r}; it has {', '.join(map(str, splits))}."
        )
    if not whole and split not in ("train", "test"):
        raise ValueError(
            f"{source} has no split {split!r}; 'train' and 'test' can be cut off it."
        )

    def choose(num_rows: int) -> list[Places]:
        places = np.arange(num_rows)
        if max_examples is not None and max_examples < num_rows:
            places = np.sort(_shuffled(num_rows)[:max_examples])
        if not whole:
            places = _cut(places, split, test_size)
        if not len(places):
            raise ValueError(
                f"{source} has no examples in its split {split!r}; "
                "give other data or another test_size."
            )
        return [places]

    rows = splits[split] if whole else next(iter(splits.values()))
    return Selection(rows, choose, columns or {}, bad)


def weigh_places(count: int, weight: float) -> list[Places]:
    """The places of so many records as often as they stand, in passes.

    Args:
      count: of records.
      weight: 2.5 gives every record twice and half of them, chosen at random, once
        more; 0.3 keeps three in ten. The choice is the same every time.

    Raises:
      ValueError: if `weight` is not positive, or so small that no record is left.
    """
    if not 0 < weight <= _MOST_TIMES:
        raise ValueError(
            f"A data set's weight is {weight}; it must be positive, and at most "
            f"{_MOST_TIMES}."
        )
    times, share = divmod(weight, 1)
    more = np.sort(_shuffled(count)[: round(share * count)])
    if not times and not len(more):
        raise ValueError(
            f"A weight of {weight} leaves none of {count} records; give a larger "
            "weight or leave the data set out."
        )
    return [np.arange(count)] * int(times) + [more] * (len(more) > 0)


def _cut(places: Places, split: str, test_size: float) -> Places:
    wanted = test_size * len(places) if test_size < 1 else test_size
    num_test = min(len(places), round(wanted))
    order = _shuffled(len(places))
    chosen = order[:num_test] if split == "test" else order[num_test:]
    return places[np.sort(chosen)]


def _shuffled(count: int) -> Places:
    """The same every time."""
    return np.random.default_rng(0).permutation(count)
