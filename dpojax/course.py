"""How many steps a run has, which batch each sees, and what is due after it.

This file knows neither the model nor what is written.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dpojax.batch import Batch
from dpojax.config import TrainConfig
from dpojax.data.loader import batches_of_seeds, counted_batches, locate
from dpojax.data.packing import Example, OwnRows, every_row
from dpojax.data.plan import Rows
from dpojax.losses.make import Loss


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool


class Course:
    """The steps of a run, each a function of its number."""

    def __init__(
        self,
        config: TrainConfig,
        loss: Loss,
        train: Sequence[Example],
        num_shards: int,
    ):
        """Counts them.

        Args:
          config: the run's settings.
          loss: its objective.
          train: what it is trained on.
          num_shards: ways in which rows are divided.

        Raises:
          ValueError: if it is to stop after its end.
        """
        self._config, self._train, self._num_shards = config, train, num_shards
        self.mismatch_within = mismatch_within(config, loss)
        epochs = 1 if config.epochs is None else config.epochs
        num_seen = max(1, round(len(train) * epochs))
        if config.steps is not None:
            num_seen = config.steps * config.batch_size
        if self.mismatch_within is not None and num_seen % config.batch_size == 1:
            num_seen -= 1  # a last batch of one example has no other completion in it
        self.num_seen = num_seen  # examples
        self.num_steps = math.ceil(num_seen / config.batch_size)
        self.stop = self.num_steps if config.stop_after is None else config.stop_after
        if self.stop > self.num_steps:
            raise ValueError(
                f"stop_after is {self.stop}, but the run has {self.num_steps} steps."
            )

    def batches(
        self,
        start: int,
        stop: int,
        num_microbatches: int,
        own_rows: OwnRows = every_row,
    ) -> Iterator[tuple[int, Batch]]:
        """The batches of the steps after `start`, see `counted_batches`."""
        order = self._order(num_microbatches)
        span = {"start": start, "stop": stop, "own_rows": own_rows}
        return counted_batches(self._train, **order, **span)

    def batches_of_seeds(
        self, seeds: Sequence[int], start: int, stop: int, num_microbatches: int
    ) -> Iterator[list[tuple[int, Batch]]]:
        """Those of runs that differ in the seed alone, see `batches_of_seeds`."""
        order = self._order(num_microbatches)
        span = {"seeds": seeds, "start": start, "stop": stop}
        return batches_of_seeds(self._train, **order, **span)

    def locate(self, step: int, num_microbatches: int) -> Rows:
        """Which examples are where in the batch after so many steps."""
        return locate(self._train, step, **self._order(num_microbatches))

    def epoch(self, step: int) -> float:
        """How often each example was seen by then, in the mean."""
        return min(step * self._config.batch_size, self.num_seen) / len(self._train)

    def due(self, step: int, stop: int) -> Due:
        """What is due after a step, if there is none after `stop` for now.

        Whether a run is stopped changes neither its lines nor its evaluations.
        """
        config, is_end = self._config, step == self.num_steps
        return Due(
            log=is_end or step % config.log_every == 0,
            evaluate=is_end or step % config.evaluate_every == 0,
            save=is_end or step % config.save_every == 0 or step == stop,
        )

    def _order(self, num_microbatches: int) -> dict[str, Any]:
        return {
            "batch_size": self._config.batch_size,
            "num_seen": self.num_seen,
            "seed": self._config.seed,
            "row_multiple": num_microbatches * self._num_shards,
            "row_length": self._config.row_length,
            "mismatch_within": self.mismatch_within,
        }


def mismatch_within(config: TrainConfig, loss: Loss) -> int | None:
    """The tokens of a prompt with another's completion, where the loss compares so."""
    return config.max_length if "mismatched" in loss.needs else None
