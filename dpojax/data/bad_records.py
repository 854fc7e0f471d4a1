"""Records that cannot be used: what is wrong with each, and what is done about it.

Either the first one stops everything, or they are left out and listed. This file knows
neither what a record is nor where it comes from.
"""

from collections.abc import Callable, Iterable, Iterator
from reprlib import Repr
from typing import Literal, NamedTuple, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

OnBadRecord = Literal["stop", "skip"]

_NUM_SHOWN = 3
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2  # deeper ones could exhaust the stack


class BadRecord(ValueError):
    """Says of one record, in one sentence, where it is and what is wrong with it."""


class Skipped(NamedTuple):
    """What was left out of a split, and how many records that had."""

    split: str
    reasons: tuple[str, ...]
    num_records: int


class BadRecords:
    """Those that are left out; without one of these, the first bad record stops."""

    def __init__(self):
        self._reasons: dict[str, None] = {}  # a record that is repeated is bad once
        self._num_records = 0

    def clear(self) -> None:
        """Forgets what was noted, where all records are gone through once more."""
        self._reasons.clear()
        self._num_records = 0

    def count(self, num_records: int) -> None:
        """Notes how many records a data set has, the bad ones included."""
        self._num_records += num_records

    def add(self, bad: BadRecord) -> None:
        """Notes a record that is left out."""
        self._reasons[str(bad)] = None

    def of_split(self, split: str) -> Skipped:
        """All that was noted."""
        return Skipped(split, tuple(self._reasons), self._num_records)


def usable(
    make: Callable[[Item], Made], items: Iterable[Item], bad: BadRecords | None
) -> Iterator[Made]:
    """What is made of each item; those of which it cannot be made are noted as bad.

    Raises:
      BadRecord: for the first of them, if there is nowhere to note it.
      ValueError: if all are bad.
    """
    num_made = 0
    first: BadRecord | None = None
    for item in items:
        try:
            made = make(item)
        except BadRecord as error:
            if bad is None:
                raise
            bad.add(error)
            first = first or error
            continue
        num_made += 1
        yield made
    if first is not None and not num_made:
        raise ValueError(f"Every record is bad, so none can be skipped: {first}")


def describe_skipped(skipped: Skipped) -> str:
    """How many were left out, and the reasons of the first few."""
    split, reasons, num_records = skipped
    first = [*reasons[:_NUM_SHOWN], *["..."] * (len(reasons) > _NUM_SHOWN)]
    counted = f"{split}: skipped {len(reasons)} bad of {num_records} records"
    return f"{counted}: {' '.join(first)}"


def shown(value: object) -> str:
    """A value for a message, however large it is."""
    return _SHORT.repr(value)


def cut(text: str) -> str:
    """What a library said, for a message, however much it is."""
    return text if len(text) <= 500 else text[:500] + " ..."


def listed(names: Iterable[object]) -> str:
    """Names for a message, however many and long, each on one line."""
    texts = [str(name) for name in names]
    short = [
        text if len(text) <= 60 and text.isprintable() else shown(text)
        for text in texts[:20]
    ]
    more = [f"and {len(texts) - 20} more"] if len(texts) > 20 else []
    return ", ".join(short + more)
