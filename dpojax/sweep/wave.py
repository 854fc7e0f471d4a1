"""The loop for several runs at once: that of `dpojax.run`, with a journal for each.

All start at one step, those of a seed see the same batches, and all stop together; one
that is no number any more stands still, and the others do not notice. This file knows
no settings but those of the loop.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from dpojax.batch import Batch
from dpojax.evaluation import Assessed, assess_all, conclude
from dpojax.journal import Journal
from dpojax.model_card import facts
from dpojax.not_finite import Case, explain
from dpojax.processes import gathered
from dpojax.progress import say
from dpojax.resume import abstract
from dpojax.run_directory import has_begun, open_directory, write_skipped
from dpojax.sharding import put_ahead
from dpojax.step_log import NotFinite
from dpojax.sweep.board import Board
from dpojax.sweep.extent import Block
from dpojax.sweep.grouping import Trial
from dpojax.sweep.program import Program
from dpojax.sweep.stacked import Place
from dpojax.sweep.standing import (
    go_back_to,
    has_diverged,
    is_finished,
    mark_diverged,
    newest_step,
)
from dpojax.trackers import Trackers
from dpojax.train_step import TrainState

IsPreempted = Callable[[int], bool]


def train_wave(
    program: Program,
    block: Block,
    stop: int,
    is_preempted: IsPreempted,
    board: Board,
) -> bool:
    """Trains some runs up to a step, from where all of them are.

    Args:
      program: what they share.
      block: so many as are trained at one time. Each keeps its place, whatever becomes
        of the others: so its numbers stay the same.
      stop: the step.
      is_preempted: asked after each step whether to end now.
      board: shows them.

    Returns:
      Whether it was told to end.
    """
    directories = [trial.directory for some in block for trial in some]
    directories = [one for one in directories if not has_diverged(one)]
    if all(map(is_finished, directories)):
        return False
    step = min(map(newest_step, directories))
    if step >= stop and stop < program.num_steps:
        return False  # where runs were dropped, those that were not are further
    go_back_to(step, directories)
    with ExitStack() as opened:
        wave = Wave(program, block, step, board, opened)
        if step == 0:
            wave.evaluate(0)
        step, told = wave.take_steps(step, stop, is_preempted)
        wave.conclude(step)
    return told


class Lane:
    """One of the runs: its journal, and what is its own of stacked arrays."""

    def __init__(self, program: Program, place: Place, trial: Trial):
        """The run of that place; `open` gives it a journal."""
        self.place, self.trial = place, trial
        self.training = program.training(trial)
        self.course = program.course(trial)
        names = program.names(trial)
        self._names = names._replace(sums=names.sums | {"grad_norm"})
        self._stacked = program.stacked

    def open(
        self, program: Program, step: int, board: Board, opened: ExitStack
    ) -> None:
        """Opens the run's directory, which a new run gets now."""
        directory, material = self.trial.directory, program.material
        config = replace(self.trial.config, resume=has_begun(directory))
        place = opened.enter_context(open_directory(config))
        place.begin(self.trial.config, material.loaded, step)
        if step == 0:
            write_skipped(directory, material.skipped)
        number, rates = self.trial.number, self.training.learning_rates
        counts = {"training": len(material.train), "held out": len(material.test)}
        about = facts(config, material.loaded.base, num_examples=counts, rates=rates)
        self.journal = Journal(
            place,
            self.trial.config,
            self.course,
            rates,
            program.note(self.trial) | {"facts": about},
            step,
            program.sampled,
            opened.enter_context(Trackers(config.track)),
            board.teller(number),
            lambda text: say(f"run {number}  {text}"),
        )
        opened.callback(self.journal.close)

    def state(self, stacked: TrainState) -> TrainState:
        """The run's own state, as if it were trained alone."""
        own = self._stacked.take(stacked, self.place)
        names = self.training.shapes.running
        return own._replace(running={name: own.running[name] for name in names})

    def fetch(self, steps: Any) -> Any:
        """The run's own sums of steps, on the host."""
        return [
            (step, self._own(sums, self._names.sums))
            for step, sums in jax.device_get(steps)
        ]

    def assessed(self, every: Assessed) -> Assessed:
        """What evaluation steps say of this run."""
        kept = [(rows, self._own(f, self._names.figures)) for rows, f in every.kept]
        total = self._own(every.total, self._names.sums - {"grad_norm"})
        return every._replace(total=total, kept=kept)

    def _own(self, named: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
        return {
            name: jax.tree.map(lambda array: gathered(array)[*self.place], tree)
            for name, tree in named.items()
            if name in names
        }


class Wave:
    """Runs that are trained at one time."""

    def __init__(
        self,
        program: Program,
        block: Block,
        step: int,
        board: Board,
        opened: ExitStack,
    ):
        """Opens their directories, and makes or restores their states."""
        self._program, self._block, self._board = program, block, board
        self._lanes = [  # those that are no number any more leave
            Lane(program, Place(seed, combination), trial)
            for seed, some in enumerate(block)
            for combination, trial in enumerate(some)
            if not has_diverged(trial.directory)
        ]
        self._values = program.lanes(block)
        self._state = program.stacked.empty()
        idle = {Place(*at) for at in np.ndindex(*program.extent)}
        for lane in self._lanes:
            lane.open(program, step, board, opened)
            state = lane.training.begin()
            if step:
                state = lane.journal.restore(jax.tree.map(abstract, state))
            self._put(lane.place, state)
            idle.remove(lane.place)
        for place in idle:
            self._put(place, state._replace(halted=np.ones((), bool)))

    def evaluate(self, step: int) -> None:
        """Measures every run on the held-out examples."""
        program = self._program

        def of_batch(batch: Batch) -> Any:
            values, frozen = self._values, program.frozen
            return program.stacked.assess(self._state, values, frozen, batch)

        every = assess_all(
            of_batch,
            program.material.test,
            batch_size=program.config.batch_size,
            placement=program.placement,
        )
        for lane in self._lanes:
            own = lane.state(self._state)
            policy, reference = program.whole(own.params, lane.trial)
            reference = own.moving.get("reference", reference)
            found = conclude(lane.assessed(every))
            lane.journal.evaluated(step, found, policy, reference)

    def take_steps(
        self, step: int, stop: int, is_preempted: IsPreempted
    ) -> tuple[int, bool]:
        """Trains until a step; returns the last, and whether it was told to end."""
        program, told = self._program, False
        course = self._lanes[0].course
        batches = program.batches(self._block, step, stop)
        for lane in self._lanes:
            lane.journal.start_steps(lane.fetch)
        for counted, placed in put_ahead(batches, program.put):
            self._state, sums = program.stacked.step(
                self._state, self._values, program.frozen, placed
            )
            self._each(lambda lane: lane.journal.steps.catch_up())
            step += 1
            for lane in self._lanes:
                lane.journal.steps.add(step, sums, counted[lane.place.seed][0])
            told = is_preempted(step)
            due = course.due(step, stop=step if told else stop)
            if due.log or due.evaluate:
                for lane in self._lanes:
                    lane.journal.steps.end_interval()
            if due.evaluate or due.save:
                self._each(lambda lane: lane.journal.settle())
                self._record(step, due.evaluate, due.save)
            self._show(f"step {step}")
            if told or not self._lanes:
                break
        return step, told

    def conclude(self, step: int) -> None:
        """Writes the models, if that was the last step."""
        if step < self._program.num_steps:
            self._show(f"stopped at {step}")
            return
        for lane in self._lanes:
            trained = lane.state(self._state).params
            lane.journal.write_model(trained, self._program.material.loaded)
        self._show("done")

    def _record(self, step: int, evaluates: bool, saves: bool) -> None:
        with ExitStack() as pauses:
            for lane in self._lanes:
                pauses.enter_context(lane.journal.steps.paused())
            if evaluates:
                self.evaluate(step)
            if saves:
                for lane in self._lanes:
                    lane.journal.save(step, lane.state(self._state))

    def _put(self, place: Place, state: TrainState) -> None:
        """Gives a run its state; statistics of losses that it lacks stay."""
        running = jax.tree.map(lambda array: array[*place], self._state.running)
        whole = state._replace(running=running | state.running)
        self._state = self._program.stacked.put(self._state, place, whole)

    def _each(self, action: Callable[[Lane], None]) -> None:
        """Does something for every run; those that are no number leave."""
        for lane in list(self._lanes):
            try:
                action(lane)
            except NotFinite as error:
                self._lanes.remove(lane)
                self._explain(lane, error)

    def _explain(self, lane: Lane, error: NotFinite) -> None:
        program, at = self._program, error.step - 1
        parts, number = program.config.microbatches, lane.trial.number
        case = Case(
            next(lane.course.batches(at, at + 1, parts))[1],
            lane.course.locate(at, parts),
            program.material.train,
            program.material.loaded.tokenizer,
            lane.trial.config,
            lane.journal.directory,
        )
        state = lane.state(self._state)
        found = explain(error, case, state, lane.training, program.placement)
        mark_diverged(lane.journal.directory, str(found))
        say(f"run {number}  {found}")
        self._board.show(number, f"no number at {error.step}")

    def _show(self, standing: str) -> None:
        for lane in self._lanes:
            journal = lane.journal
            self._board.show(
                lane.trial.number, standing, journal.steps.latest, journal.last
            )
