"""What one run writes as it goes: lines, samples, checkpoints and the trained model.

A loop tells it of every step, and hands it the state when that is due: its own or, of
many runs that are trained at once, the one that this journal is about. This file knows
no model's functions and takes no step.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from dpojax.advice import Adviser
from dpojax.checkpoint import Checkpoints, Note
from dpojax.config import TrainConfig
from dpojax.course import Course
from dpojax.data.tokenizer_files import write_tokenizer
from dpojax.evaluation import Evaluation
from dpojax.held_out_samples import Sampled
from dpojax.loading import Loaded
from dpojax.memory_peaks import peak_memory
from dpojax.metrics_file import MetricsFile
from dpojax.model_card import make_card, with_card
from dpojax.policy import write_trained
from dpojax.prepare import is_logistic
from dpojax.processes import is_first
from dpojax.progress import say
from dpojax.recording import Recording
from dpojax.reference import Params
from dpojax.resume import check_note
from dpojax.run_directory import RunDirectory, read_small_files
from dpojax.run_log import figures_line, time_line
from dpojax.step_log import Figures, StepLog
from dpojax.trackers import Trackers
from dpojax.train_step import TrainState

_NEW: Note = {"evaluation": {}, "evaluated_at": -1, "unlogged": []}


class Journal:
    """The files of a run, from a step on."""

    def __init__(
        self,
        place: RunDirectory,
        config: TrainConfig,
        course: Course,
        learning_rates: np.ndarray,
        note: Note,
        step: int,
        sampled: Sampled,
        trackers: Trackers,
        tell: Callable[[str], None] = say,
        warn: Callable[[str], None] = say,
    ):
        """Opens the files; what is in them after that step is dropped.

        Args:
          place: where the run writes.
          config: its settings.
          course: its steps.
          learning_rates: of each step.
          note: what must be the same for a resumed run to be the same run, and the
            `facts` of its card.
          step: where it goes on, of which there is a checkpoint, or 0.
          sampled: continues held-out prompts.
          trackers: services that are not open yet.
          tell: shows a line of figures.
          warn: shows a warning.

        Raises:
          ValueError: if what is there is another run.
        """
        directory = self.directory = place.path
        self._config, self._course = config, course
        self._rates, self._note, self._step = learning_rates, note, step
        self._sampled, self._tell = sampled, tell
        self._checkpoints = Checkpoints(place.checkpoints, keep_last=config.keep_last)
        saved = self._checkpoints.note(step) if step else _NEW
        if step:
            check_note(saved, note, directory)
        # The newest evaluation and its step
        self.last: dict[str, float] = saved["evaluation"]
        self._last_at: int = saved["evaluated_at"]
        self._unlogged: Figures = saved["unlogged"]
        adviser = Adviser(
            batch_size=config.batch_size, is_logistic=is_logistic(config.loss)
        )
        self._log = Recording(
            directory, step or -1, adviser, trackers, note["configuration"], warn
        )
        self._each = MetricsFile(directory / "held_out.jsonl", keep_until=step or -1)

    def restore(self, like: TrainState) -> TrainState:
        """The state of the step where the run goes on, onto the shardings of `like`."""
        return self._checkpoints.restore(self._step, like)

    def start_steps(self, fetch: Callable[[Any], Any] = jax.device_get) -> StepLog:
        """The log of the steps to come; its clock starts.

        Args:
          fetch: see `StepLog`.
        """
        self.steps = StepLog(
            self._logged, self._unlogged, fetch, on_nan=self._config.on_nan
        )
        return self.steps

    def settle(self) -> None:
        """Waits for all steps so far; what is no number is found before it is saved.

        Raises:
          NotFinite: as `StepLog.catch_up`.
        """
        self.steps.catch_up()
        self._unlogged = self.steps.unlogged()

    def evaluated(
        self, step: int, found: Evaluation, params: Params, reference: Params | None
    ) -> dict[str, float]:
        """Writes an evaluation, and what the policy makes of the held-out prompts."""
        values = dict(found.values)
        values |= self._sampled(
            self.directory, step, self._config.seed, params, reference
        )
        self._log.write(step, "test", values)
        self._each.write_each(step, found.figures)
        self._tell(figures_line(f"test  step {step}", values))
        self.last, self._last_at = values, step
        return values

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing a checkpoint; the steps are settled."""
        self._log.keep()
        self._each.keep()
        best_by = self.last["loss"] if self._last_at == step else None
        files = read_small_files(self.directory) if is_first() else {}
        self._checkpoints.save(step, state, self._newest_note(), best_by, files)

    def close(self) -> None:
        """Waits until every checkpoint is written.

        Raises:
          OSError: if one could not be.
        """
        self._checkpoints.close()

    def write_model(self, trained: Params, loaded: Loaded) -> None:
        """Writes what was trained, at the end of the run."""
        final = self.directory / "final"
        card = make_card(
            self._newest_note(),
            self._course.num_steps,
            is_adapter=loaded.model.lora is not None,
            is_reward=loaded.model.config.head == "score",
        )
        write_trained(
            final,
            trained,
            loaded.model,
            loaded.settings,
            loaded.base,
            with_card(partial(write_tokenizer, loaded.tokenizer), card),
            generation_settings=loaded.generation_settings,
        )
        self._tell(f"The model is in {final}.")

    def _newest_note(self) -> Note:
        return self._note | {
            "evaluation": self.last,
            "evaluated_at": self._last_at,
            "unlogged": self._unlogged,
        }

    def _logged(self, step: int, values: dict[str, float]) -> None:
        values["learning_rate"] = float(self._rates[step - 1])
        values["memory_gib"] = peak_memory() or math.nan
        values["epoch"] = self._course.epoch(step)
        self._log.write(step, "train", values)
        num_steps = self._course.num_steps
        if step == num_steps or step % self._config.log_every == 0:
            left = time_line(self.steps.seconds_left(num_steps - step))
            self._tell(figures_line(f"train step {step}", values) + left)
