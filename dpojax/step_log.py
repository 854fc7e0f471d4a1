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
from dpojax.guard import OnNan
from dpojax.progress import say

# Of steps whose line is not written yet: each with its sums, leaf by leaf, as JSON can
# hold them without a loss; None where its update was skipped.
Figures = list[tuple[int, list[Any] | None]]

# Updates skipped one after another, after which a run gives up: a few bad examples do
# not make so many, and weights that give no numbers will not give any again.
MOST_SKIPPED = 10
_WATCHED = ("loss", "grad_norm")


class NotFinite(FloatingPointError):
    """A step whose loss or gradient is not finite, and at which the run ends."""

    def __init__(self, step: int, sentence: str):
        """Remembers the step's number, from 1 on."""
        super().__init__(sentence)
        self.step = step


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
        on_nan: OnNan = "stop",
    ):
        """Starts the clock.

        Args:
          write: takes the last step of an interval, and its means.
          unlogged: of the run that is continued, as `unlogged` gave them.
          fetch: arrays on devices to arrays of the host; waits for them.
          clock: seconds.
          on_nan: what becomes of a step that is not finite, as the step itself has it.
            Those that were skipped are counted in ``skipped_updates``, and in no mean.
        """
        self._write, self._fetch, self._clock = write, fetch, clock
        self._earlier = unlogged or []
        self._on_nan: OnNan = on_nan
        self._skipped = 0  # in succession
        self._judged = -1  # the last step that was looked at
        self._current = _Interval([], 0)
        self._ended: _Interval | None = None
        self._speeds: list[float] = []
        self._step_seconds: list[float] = []
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
          NotFinite: naming the step whose loss or gradient is not finite, unless it was
            skipped, or the last of too many in succession that were.
        """
        if self._ended is None:
            return
        interval, self._ended = self._ended, None
        steps = self._fetch(interval.steps)
        now = self._clock()
        self._speeds.append(interval.num_tokens / (now - self._since))
        self._step_seconds.append((now - self._since) / len(steps))
        self._since = now
        like, lists = steps[-1][1], [leaves for _, leaves in self._earlier]
        made = [_as_sums(leaves, like) for leaves in lists if leaves is not None]
        made += [sums for step, sums in steps if self._is_made(step, sums)]
        self._earlier = []
        self.latest = _means(made) if made else {}
        if self._on_nan == "skip":
            num_skipped = len(lists) + len(steps) - len(made)
            self.latest["skipped_updates"] = float(num_skipped)
        self.latest["tokens_per_second"] = self._speeds[-1]
        self._write(steps[-1][0], self.latest)

    def unlogged(self) -> Figures:
        """The figures since the last line; waits for the last of the steps.

        Raises:
          NotFinite: as `catch_up`.
        """
        lists = [
            (step, _as_lists(sums) if self._is_made(step, sums) else None)
            for step, sums in self._fetch(self._current.steps)
        ]
        return [*self._earlier, *lists]

    def _is_made(self, step: int, sums: metrics.Sums) -> bool:
        """Whether a step's update was made, and not skipped."""
        values = metrics.summarize({name: sums[name] for name in _WATCHED})
        bad = [name for name in _WATCHED if not math.isfinite(values[name])]
        if step > self._judged:
            self._judged = step
            self._skipped = self._skipped + 1 if bad else 0
            if bad:
                self._tell(step, f"The {bad[0]} of step {step} is {values[bad[0]]}")
        return not bad

    def _tell(self, step: int, what: str) -> None:
        if self._on_nan == "stop":
            raise NotFinite(
                step,
                f"{what}; the run stops here. Its last checkpoint is from before this "
                "step.",
            )
        if self._skipped == MOST_SKIPPED:
            raise NotFinite(
                step,
                f"{what}, and so it was in {MOST_SKIPPED} steps in succession, whose "
                "updates were skipped; the run stops here.",
            )
        say(f"{what}; its update is skipped.")

    @property
    def median_speed(self) -> float:
        """Tokens a second, the median over the intervals."""
        return float(np.median(self._speeds or [np.nan]))

    def seconds_left(self, num_steps: int) -> float | None:
        """What so many steps take; None before an interval without compilation."""
        measured = self._step_seconds[1:]
        return num_steps * float(np.median(measured)) if measured else None


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
