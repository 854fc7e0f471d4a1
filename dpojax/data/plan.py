"""Which examples share a row, and the few shapes that a run's batches have.

Everything here is a function of lengths: the positions that examples take, see
`dpojax.data.packing`. This file knows no tokens, and not which examples share a batch.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

Lengths = Int[np.ndarray, " examples"]
Rows = list[list[int]]  # of each row, the places of its examples

_AS_GOOD = 1.01  # times the least waste: of such row lengths the shortest is taken
_MOST_ROW_LENGTH = 2  # times the longest example, because attention costs its rows'
_FINEST = 64  # rows are counted in steps of at most one part in so many


class Shape(NamedTuple):
    """What all batches of a run have in common, so that few programs are compiled."""

    row_length: int
    num_rows: tuple[int, ...]  # a batch has the first of these that is enough
    num_slots: int  # the most examples of a row


def pack_rows(lengths: Lengths, row_length: int, num_slots: int) -> Rows:
    """Puts whole examples into few rows that are equally full.

    From the longest on, each goes to the emptiest row. Where this overflows, as it does
    with two or three examples a row, the fullest row that still has room takes it.

    Args:
      lengths: positions that each example takes, at most `row_length`.
      row_length: positions of a row.
      num_slots: the most examples of a row.

    Returns:
      For each row the places of its examples, each place once.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    fewest = max(-(-sum(sizes) // row_length), -(-len(sizes) // num_slots))
    rows = _balance(order, sizes, fewest, row_length, num_slots)
    if rows is not None:
        return rows
    filled = _fill(order, sizes, row_length, num_slots)
    step = max(1, fewest // _FINEST)
    for count in range(fewest + step, len(filled) + 1, step):
        rows = _balance(order, sizes, count, row_length, num_slots)
        if rows is not None:
            return rows
    return filled


def _balance(
    order: list[int], sizes: list[int], count: int, row_length: int, num_slots: int
) -> Rows | None:
    """Into so many rows, each example into the emptiest; None if that overflows."""
    rows: Rows = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]  # a heap
    for place in order:
        if not loads:
            return None
        load, row = loads[0]
        load += sizes[place]
        if load > row_length:
            return None
        rows[row].append(place)
        if len(rows[row]) < num_slots:
            heapq.heapreplace(loads, (load, row))
        else:
            heapq.heappop(loads)
    return rows


def _fill(order: list[int], sizes: list[int], row_length: int, num_slots: int) -> Rows:
    """Each example into the fullest row that has room for it, or into a new one."""
    rows: Rows = []
    rooms: list[tuple[int, int]] = []  # what is left of rows, sorted
    for place in order:
        at = bisect_left(rooms, (sizes[place],))
        if at == len(rooms):
            rows.append([])
            room, row = row_length, len(rows) - 1
        else:
            room, row = rooms.pop(at)
        rows[row].append(place)
        room -= sizes[place]
        if room > 0 and len(rows[row]) < num_slots:
            insort(rooms, (room, row))
    return rows


def choose_shape(
    batches: Sequence[Int[np.ndarray, " _"]],
    *,
    longest: int,
    row_multiple: int = 1,
    row_length: int | None = None,
) -> Shape:
    """The shape of a run's batches, from some of them.

    Args:
      batches: positions that the examples of each take.
      longest: positions that the longest example of the run can take.
      row_multiple: the number of rows is a multiple of this.
      row_length: positions of a row; None: of the lengths that leave least padding in
        these batches, to within 1 %, the shortest.

    Raises:
      ValueError: if an example does not fit into a row.
    """
    if row_length is not None and row_length < longest:
        raise ValueError(
            f"row_length is {row_length}, but an example can take {longest} positions; "
            "give at least that, or a smaller max_length."
        )
    lengths = _row_lengths(longest) if row_length is None else [row_length]
    slots = [choose_slots(np.concatenate(batches), length) for length in lengths]
    counts = [
        [
            round_up(len(pack_rows(batch, length, most)), row_multiple)
            for batch in batches
        ]
        for length, most in zip(lengths, slots, strict=True)
    ]
    positions = np.mean(counts, axis=1) * lengths
    best = int(np.argmax(positions <= _AS_GOOD * positions.min()))
    enough = round_up(max(map(len, batches)), row_multiple)  # an example a row
    num_rows = _row_counts(min(counts[best]), enough, row_multiple)
    return Shape(lengths[best], num_rows, slots[best])


def choose_slots(lengths: Lengths, row_length: int) -> int:
    """The most examples of a row: three times what rows hold on average, or all."""
    return min(len(lengths), 3 * -(-row_length * len(lengths) // int(lengths.sum())))


def round_up(number: int, multiple: int) -> int:
    """The first multiple that is not smaller."""
    return -(-number // multiple) * multiple


def _row_lengths(longest: int) -> list[int]:
    """Lengths that hold the longest example, such as hardware likes: 128 lanes."""
    lengths = [_next_length(longest)]
    while lengths[-1] < _MOST_ROW_LENGTH * longest:
        lengths.append(_next_length(lengths[-1] + 1))
    return lengths


def _next_length(length: int) -> int:
    return round_up(length, 16 if length <= 128 else 64 if length <= 512 else 128)


def _row_counts(fewest: int, enough: int, multiple: int) -> tuple[int, ...]:
    """From `fewest` on in steps that double, so that no data make many programs."""
    step = round_up(-(-fewest // _FINEST), multiple)
    counts = [fewest]
    while counts[-1] < enough:
        counts.append(fewest + step * 2 ** (len(counts) - 1))
    return tuple(counts)
