"""Which examples share a batch: a function of seed, epoch and lengths.

An epoch is a permutation of the examples drawn from (seed, epoch), cut into windows.
Within a window its examples are dealt to batches so that all batches have nearly the
same number of positions, and so need the same number of rows; a stream could be dealt
so too. A quarter of each batch comes by chance, so that no two epochs have the same
batches. Nothing depends on the devices: a run that goes on elsewhere sees the same
examples together. This file knows no tokens.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from dpojax.data.plan import Lengths, pack_rows

Places = Int[np.ndarray, " _"]  # of examples, any number of them
Order = Callable[[range], Places]  # the examples in these places of the whole run

WINDOW = 16_384  # examples; the mean length of so many varies by half a percent
_SPARE = 0.02  # of a row, left empty so that most batches fit as they are planned


def make_order(
    lengths: Lengths,
    *,
    batch_size: int,
    seed: int,
    window: int = WINDOW,
    row_length: int | None = None,
) -> Order:
    """Builds the order in which a run sees its examples, each once an epoch.

    Args:
      lengths: positions that each example takes.
      batch_size: examples of a batch; those of batch b have the places from
        ``b * batch_size`` on. A batch may span the end of one epoch and the next.
      seed: decides the order of every epoch.
      window: about so many examples are dealt to batches at one time.
      row_length: given, batches have positions for whole rows of this length: some
        need one row more than others. None: all batches are alike.

    Returns:
      ``order(places) -> examples``, for the places of one batch.
    """
    num_examples = len(lengths)

    @lru_cache(maxsize=2)  # a batch may span the end of one epoch and the next
    def permuted(epoch: int) -> tuple[Places, list[Places]]:
        """The examples, and where the batches of each window begin and end."""
        rng = np.random.default_rng((seed, epoch))
        first = -epoch * num_examples % batch_size
        begins = np.array([0, *range(first or batch_size, num_examples, batch_size)])
        ends = np.append(begins, num_examples)
        return rng.permutation(num_examples), _cut(ends, -(-num_examples // window))

    @lru_cache(maxsize=4)
    def dealt(epoch: int, number: int) -> Places:
        examples, windows = permuted(epoch)
        begins = windows[number]
        chosen = examples[begins[0] : begins[-1]]
        rng = np.random.default_rng((seed, epoch, number))
        sizes = np.diff(begins).tolist()
        batches = deal_window(lengths[chosen], sizes, batch_size, row_length, rng)
        return chosen[np.concatenate(batches)]

    def order(places: range) -> Places:
        parts, place = [np.zeros(0, int)], places.start
        while place < places.stop:
            epoch, start = divmod(place, num_examples)
            stop = min(num_examples, start + places.stop - place)
            windows = permuted(epoch)[1]
            number = bisect_right(windows, start, key=lambda begins: begins[0]) - 1
            before = windows[number][0]
            parts.append(dealt(epoch, number)[start - before : stop - before])
            place += stop - start
        return np.concatenate(parts)

    return order


def deal_window(
    lengths: Lengths,
    sizes: Sequence[int],
    batch_size: int,
    row_length: int | None,
    rng: np.random.Generator,
) -> list[Places]:
    """Deals a window of examples to batches.

    Args:
      lengths: positions that each example takes.
      sizes: examples of each batch; the first and the last may be parts of batches that
        another epoch completes, and get examples of every length.
      batch_size: examples of a whole batch.
      row_length: as `make_order` takes it.
      rng: decides what neither sizes nor lengths decide.

    Returns:
      The places of each batch's examples, in the order of the window.
    """
    left = np.arange(len(lengths))
    parts = {}
    for number in (0, len(sizes) - 1):
        size = sizes[number]
        if size < batch_size and number not in parts:
            by_length = np.argsort(lengths[left], kind="stable")
            even = (np.arange(size) + 0.5) * len(left) / size
            chosen = by_length[even.astype(int)]
            parts[number] = left[chosen]
            left = np.delete(left, chosen)
    whole = iter(_deal_whole(lengths[left], batch_size, row_length, rng))
    return [
        np.sort(parts[number] if number in parts else left[next(whole)])
        for number in range(len(sizes))
    ]


def deal(
    lengths: Lengths,
    batch_size: int,
    targets: Float[np.ndarray, " batches"],
    ranks: Int[np.ndarray, " batches"],
) -> list[Places]:
    """Deals examples to batches of one size, so that their sums come near targets.

    A quarter of each batch are the first examples, as they stand. Of the others, from
    the longest on, each goes to the batch that most needs length for each of the
    examples that it still lacks.

    Args:
      lengths: positions that each example takes.
      batch_size: examples of a batch.
      targets: the positions that each batch should have.
      ranks: of batches that need as much, the one of the lowest rank comes first.

    Returns:
      The places of each batch's examples.
    """
    num_batches, free = len(targets), min(batch_size - 1, -(-batch_size // 4))
    first = np.arange(num_batches * free).reshape(num_batches, free)
    others = np.arange(first.size, len(lengths))
    needed = (targets - lengths[first].sum(axis=1)).tolist()
    left = [batch_size - free] * num_batches
    batches, positions = first.tolist(), lengths.tolist()
    # A heap's first is its smallest, so what is needed stands there as negative.
    heap = [
        (-needed[batch] / left[batch], int(rank), batch)
        for batch, rank in enumerate(ranks)
    ]
    heapq.heapify(heap)
    for place in others[np.argsort(-lengths[others], kind="stable")].tolist():
        _, rank, batch = heap[0]
        batches[batch].append(place)
        needed[batch] -= positions[place]
        left[batch] -= 1
        if left[batch]:
            mean = needed[batch] / left[batch]
            heapq.heapreplace(heap, (-mean, rank, batch))
        else:
            heapq.heappop(heap)
    return [np.array(places) for places in batches]


def _cut(ends: Places, count: int) -> list[Places]:
    """Batches' ends into so many windows of nearly as many batches, or fewer."""
    cuts = np.unique(np.linspace(0, len(ends) - 1, count + 1).round().astype(int))
    return [ends[start : stop + 1] for start, stop in pairwise(cuts)]


def _deal_whole(
    lengths: Lengths,
    batch_size: int,
    row_length: int | None,
    rng: np.random.Generator,
) -> list[Places]:
    """Deals to batches that are alike or, if that makes fewer rows, need whole rows."""
    num_batches = len(lengths) // batch_size
    if num_batches == 0:
        return []
    ranks = rng.permutation(num_batches)
    equal = np.full(num_batches, lengths.sum() / num_batches)
    alike = deal(lengths, batch_size, equal, ranks)
    if row_length is None:
        return alike
    rows = (1 + _SPARE) * len(pack_rows(lengths, row_length, len(lengths)))
    few, num_larger = int(rows / num_batches), math.ceil(rows % num_batches)
    targets = (few + (ranks < num_larger)) * (lengths.sum() / rows)
    in_rows = deal(lengths, batch_size, targets, ranks)

    def num_rows(batches: list[Places]) -> int:
        packed = [pack_rows(lengths[b], row_length, batch_size) for b in batches]
        return sum(map(len, packed))

    return min(alike, in_rows, key=num_rows)
