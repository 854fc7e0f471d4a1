"""The figures of training, fetched while the next step runs.

A host that waits for a step's figures before it dispatches the next one leaves the
devices idle for as long as it takes to write a line, to place a batch and to dispatch.
So an interval's figures are fetched, all at once, when the step after it has been
dispatched. This file knows no model and no file.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax import metrics

# Of steps whose line is not written yet: each with its sums, leaf by leaf, as JSON can
# hold them without a loss.
Figures = list[tuple[int, list[Any]]]


class _Interval(NamedTuple):
    """Steps between two lines of figures, their figures still on the devices."""

    steps: list[tuple[int, metrics.Sums]]
    num_tokens: int


class StepLog:
    """Sums of steps to a line of means for each interval."""

    def __init__(
        self,
        write: Callable[[int, dict[str, float]], None],
        unlogged: Figures | None = None,
        fetch: Callable[[Any], Any] = jax.device_get,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts the clock.

        Args:
          write: takes the last step of an interval, and its means.
          unlogged: of the run that is continued, as `unlogged` gave them.
          fetch: arrays on devices to arrays of the host; waits for them.
          clock: seconds.
        """
        self._write, self._fetch, self._clock = write, fetch, clock
        self._earlier = unlogged or []
        self._current = _Interval([], 0)
        self._ended: _Interval | None = None
        self._speeds: list[float] = []
        self.latest: dict[str, float] = {}  # the newest line
        self._since = self._clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within takes no time of the steps."""
        start = self._clock()
        yield
        self._since += self._clock() - start

    def add(self, step: int, sums: metrics.Sums, num_tokens: int) -> None:
        """Remembers a step that has been dispatched, and how many tokens it has."""
        steps, before = self._current
        self._current = _Interval([*steps, (step, sums)], before + num_tokens)

    def end_interval(self) -> None:
        """A line is due; `catch_up` writes it."""
        self._ended, self._current = self._current, _Interval([], 0)

    def catch_up(self) -> None:
        """Writes the line that is due, if one is; waits for the last of its steps.

        Raises:
          FloatingPointError: naming the step whose loss or gradient is not finite.
        """
        if self._ended is None:
            return
        interval, self._ended = self._ended, None
        steps = self._fetch(interval.steps)
        now = self._clock()
        self._speeds.append(interval.num_tokens / (now - self._since))
        self._since = now
        for step, sums in steps:
            _check_finite(step, sums)
        earlier = [_as_sums(leaves, steps[-1][1]) for _, leaves in self._earlier]
        self._earlier = []
        self.latest = _means([*earlier, *(sums for _, sums in steps)])
        self.latest["tokens_per_second"] = self._speeds[-1]
        self._write(steps[-1][0], self.latest)

    def unlogged(self) -> Figures:
        """The figures since the last line; waits for the last of the steps.

        Raises:
          FloatingPointError: as `catch_up`.
        """
        steps = self._fetch(self._current.steps)
        for step, sums in steps:
            _check_finite(step, sums)
        lists = [(step, _as_lists(sums)) for step, sums in steps]
        return [*self._earlier, *lists]

    @property
    def median_speed(self) -> float:
        """Tokens a second, the median over the intervals."""
        return float(np.median(self._speeds or [np.nan]))


def _check_finite(step: int, sums: metrics.Sums) -> None:
    values = metrics.summarize({name: sums[name] for name in ("loss", "grad_norm")})
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise FloatingPointError(
                f"The {name} of step {step} is {values[name]}; the run stops here. "
                "Its last checkpoint is from before this step."
            )


def _as_lists(sums: metrics.Sums) -> list[Any]:
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(sums)]


def _as_sums(leaves: list[Any], like: metrics.Sums) -> metrics.Sums:
    """Sums again, of the structure and dtypes of another step's."""
    arrays, structure = jax.tree.flatten(like)
    pairs = zip(leaves, arrays, strict=True)
    return structure.unflatten([np.asarray(leaf, array.dtype) for leaf, array in pairs])


def _means(steps: list[metrics.Sums]) -> dict[str, float]:
    """The means over all examples of some steps."""

    def add(*parts: np.ndarray) -> Any:
        return np.sum(parts, axis=0, dtype=np.float64)

    return metrics.summarize(jax.tree.map(add, *steps))
