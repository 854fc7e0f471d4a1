"""The fastest way of computing a step that fits: meshes, what is recomputed, parts.

It is given functions that compile a step and bound its time, and knows neither models
nor programs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dpojax.fit import Way

Sizes = tuple[int, int, int, int, int]  # of the mesh, by `dpojax.sharding.AXES`
# So near the best that a program which may be better is not worth compiling.
_NEAR = 0.98


class Candidate(NamedTuple):
    """A way of computing a step, before it is compiled."""

    sizes: Sizes
    way: Way
    bound: float  # seconds; no program of it is faster
    guess: float  # seconds, for the order in which candidates are tried

    def __str__(self) -> str:
        data, fsdp, _, _, tensor = self.sizes
        return f"data {data}, fsdp {fsdp}, tensor {tensor}, {self.way}"


class Tried(NamedTuple):
    """A candidate and what came of it."""

    candidate: Candidate
    seconds: float | None  # None: it does not fit


class Found(NamedTuple):
    """Of a search."""

    best: Candidate | None
    tried: list[Tried]
    num_left: int  # that cannot fit, or cannot be faster than what was found


def mesh_shapes(num_chips: int, most_tensor: int, num_rows: int) -> Iterator[Sizes]:
    """Meshes of a number of chips; no experts and no positions are divided.

    Args:
      num_chips: their product.
      most_tensor: ``tensor`` divides it.
      num_rows: of a batch; no more shards of rows than these.
    """
    for tensor in _divisors(num_chips):
        if most_tensor % tensor == 0 and num_chips // tensor <= num_rows:
            for fsdp in _divisors(num_chips // tensor):
                yield num_chips // tensor // fsdp, fsdp, 1, 1, tensor


def search(
    candidates: Sequence[Candidate],
    evaluate: Callable[[Candidate], float | None],
    tell: Callable[[Tried], None],
) -> Found:
    """The fastest candidate that fits, by trying all that could be faster.

    Of a mesh the first way that fits is taken: those after it recompute more or take
    more microbatches. Where a mesh is too small for a step that keeps nothing, one that
    keeps more is not tried.

    Args:
      candidates: in any order; of one mesh the fastest first.
      evaluate: seconds of a step, or None if it does not fit.
      tell: is told what came of each.
    """
    tried: list[Tried] = []
    hopeless: set[tuple[Sizes, int]] = set()
    settled: set[Sizes] = set()
    best: Tried | None = None
    left = 0
    for candidate in sorted(candidates, key=lambda one: (one.guess, one.bound)):
        parts = candidate.way.num_microbatches
        limit = None if best is None else best.seconds
        is_slower = limit is not None and candidate.bound >= _NEAR * limit
        is_settled = candidate.sizes in settled
        if is_slower or is_settled or (candidate.sizes, parts) in hopeless:
            left += 1
            continue
        found = Tried(candidate, evaluate(candidate))
        tried.append(found)
        tell(found)
        if found.seconds is None:
            if candidate.way.remat == "full":
                hopeless |= {(candidate.sizes, n) for n in range(1, parts + 1)}
            continue
        settled.add(candidate.sizes)
        if limit is None or found.seconds < limit:
            best = found
    return Found(None if best is None else best.candidate, tried, left)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
