"""Which examples share a row, and the few shapes that a run's batches have.

Everything here is a function of lengths: the positions that examples take, see
`dpojax.data.packing`. This file knows no tokens, and not which examples share a batch.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

Lengths = Int[np.ndarray, " examples"]
Rows = list[list[int]]  # of each row, the places of its examples

_AS_GOOD = 1.01  # times the least waste: of such row lengths the shortest is taken
_MOST_ROW_LENGTH = 2  # times the longest example, because attention costs its rows'
_WORTH_IT = 0.95  # of the positions, if a second row length saves that it is used
_FINEST = 64  # rows are counted in steps of at most one part in so many


class Small(NamedTuple):
    """Rows for the batches that have no long example."""

    num_rows: int
    row_length: int


class Shape(NamedTuple):
    """What all batches of a run have in common, so that few programs are compiled."""

    row_length: int
    num_rows: tuple[int, ...]  # a batch has the first of these that is enough
    num_slots: int  # the most examples of a row
    small: Small | None = None  # if it fits, a batch has these rows instead


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


def fill_shape(lengths: Lengths, shape: Shape) -> tuple[Rows, int]:
    """Packs a batch into rows of a shape.

    Returns:
      The rows, the last of which may be empty, and their length.
    """
    if shape.small is not None:
        num_rows, row_length = shape.small
        rows = _fit(lengths, row_length, shape.num_slots)
        if rows is not None and len(rows) <= num_rows:
            return _with_empty(rows, num_rows), row_length
    rows = pack_rows(lengths, shape.row_length, shape.num_slots)
    num_rows = next(number for number in shape.num_rows if number >= len(rows))
    return _with_empty(rows, num_rows), shape.row_length


def fill_alike(batches: Sequence[Lengths], shape: Shape) -> tuple[list[Rows], int]:
    """Packs several batches into equally many rows of one length, those of a shape.

    Returns:
      The rows of each, the last of which may be empty, and their length.
    """
    filled = [fill_shape(lengths, shape) for lengths in batches]
    if len({row_length for _, row_length in filled}) > 1:
        large = shape._replace(small=None)
        filled = [fill_shape(lengths, large) for lengths in batches]
    num_rows, row_length = max(len(rows) for rows, _ in filled), filled[0][1]
    return [_with_empty(rows, num_rows) for rows, _ in filled], row_length


def _with_empty(rows: Rows, num_rows: int) -> Rows:
    return rows + [[] for _ in range(num_rows - len(rows))]


def _fit(lengths: Lengths, row_length: int, num_slots: int) -> Rows | None:
    """Rows, or None if an example is longer than these."""
    if lengths.max() > row_length:
        return None
    return pack_rows(lengths, row_length, num_slots)


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
        these batches, to within 1 %, the shortest; and a second, shorter one where
        long examples are what makes the padding, as in small batches they do.

    Raises:
      ValueError: if an example does not fit into a row.
    """
    if row_length is not None and row_length < longest:
        raise ValueError(
            f"row_length is {row_length}, but an example can take {longest} positions; "
            "give at least that, or a smaller max_length."
        )
    lengths = _row_lengths(longest) if row_length is None else [row_length]
    most = max(map(len, batches))
    # Three times the examples that rows hold on average.
    mean = np.mean(np.concatenate(batches))
    slots = [min(most, 3 * math.ceil(length / mean)) for length in lengths]
    counts = [
        [
            round_up(len(pack_rows(batch, length, num_slots)), row_multiple)
            for batch in batches
        ]
        for length, num_slots in zip(lengths, slots, strict=True)
    ]
    positions = np.mean(counts, axis=1) * lengths
    best = int(np.argmax(positions <= _AS_GOOD * positions.min()))
    enough = round_up(most, row_multiple)  # an example a row
    num_rows = _row_counts(min(counts[best]), enough, row_multiple)
    shape = Shape(lengths[best], num_rows, slots[best])
    if row_length is not None:
        return shape
    return shape._replace(small=_choose_small(batches, shape, row_multiple))


def _choose_small(
    batches: Sequence[Int[np.ndarray, " _"]], shape: Shape, row_multiple: int
) -> Small | None:
    """The rows for batches without long examples that save most; None: too little."""
    filled = [fill_shape(batch, shape) for batch in batches]
    large = np.array([len(rows) * row_length for rows, row_length in filled])
    if sum(batch.sum() for batch in batches) > _WORTH_IT * large.sum():
        return None
    best, least = None, _WORTH_IT * large.sum()
    row_length = _next_length(1)
    while row_length < shape.row_length:
        fitted = [_fit(batch, row_length, shape.num_slots) for batch in batches]
        counts = np.array(
            [np.inf if r is None else round_up(len(r), row_multiple) for r in fitted]
        )
        for count in np.unique(counts[counts < np.inf]).astype(int).tolist():
            small = np.where(counts <= count, count * row_length, np.inf)
            total = np.minimum(large, small).sum()
            if total < least:
                best, least = Small(count, row_length), total
        row_length = _next_length(row_length + 1)
    return best


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
