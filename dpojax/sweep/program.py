"""What the runs of one program share: model, data, and the compiled step of all.

This file reads settings; it knows no loop.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
from jax.sharding import Mesh

from dpojax.course import Course
from dpojax.data.loader import fingerprint
from dpojax.fit import SHARE, needed
from dpojax.held_out_samples import make_sample_writer
from dpojax.material import load_material
from dpojax.measure import Measured
from dpojax.policy import Policy, default_learning_rate, of_seed
from dpojax.prepare import largest_learning_rate
from dpojax.reference import Params
from dpojax.reference_setting import make_movement
from dpojax.resume import abstract, make_note
from dpojax.sharding import make_placement, rows_sharding
from dpojax.sweep.grouping import Trial, representative
from dpojax.sweep.objectives import Names, Objectives
from dpojax.sweep.stacked import Lanes, Stacked, as_lanes, make_stacked
from dpojax.training import Training, make_training


class Program:
    """Runs of one model on the same data, trained some at a time."""

    def __init__(
        self,
        trials: Sequence[Trial],
        mesh: Mesh,
        most: int | None,
        memory: float | None,
    ):
        """Loads what they share, and finds how many are trained at one time.

        Args:
          trials: the runs.
          mesh: where everything is.
          most: so many at most; None: those of a seed.
          memory: bytes of a device that must hold them; None: not to be asked.

        Raises:
          ValueError: for models and data that cannot be; if not even one run fits.
        """
        shared = representative(trials)
        self.config, self._mesh = shared.config, mesh
        self.material = load_material(shared.config, shared.loss, mesh)
        self.placement = make_placement(mesh)
        self._fingerprint = fingerprint(self.material.train)
        course = self.course(shared)
        self.num_steps, self.stop = course.num_steps, course.stop
        first_of = {trial.config.loss: trial for trial in reversed(trials)}
        self._numbers = {loss: number for number, loss in enumerate(first_of)}
        self._objectives = Objectives([trial.loss for trial in first_of.values()])
        movement = make_movement(shared.config.moving, shared.loss)
        policy = self.material.policy
        self.frozen = None if movement is not None else policy.frozen
        self._policies = {shared.config.seed: policy}
        some = [self.training(trial) for trial in first_of.values()]
        running = {k: shape for one in some for k, shape in one.shapes.running.items()}
        self._batch = next(course.batches(0, 1, self.config.microbatches))[1]
        self._make: Callable[..., Stacked] = partial(
            make_stacked,
            self.config,
            self._objectives,
            self.material.loaded,
            policy,
            mesh,
            num_steps=self.num_steps,
            movement=movement,
            shapes=some[0].shapes._replace(running=running),
        )
        most = min(max(map(len, _by_seed(trials))), most or len(trials))
        self.width = most if memory is None else self._fitting(most, memory)
        self.stacked = self._make(num_lanes=self.width)
        loaded, test = self.material.loaded, self.material.test
        self.sampled = make_sample_writer(
            self.config, shared.loss, loaded, test, self.placement
        )

    def waves(self, trials: Sequence[Trial]) -> list[list[Trial]]:
        """Those that are trained at one time: of one seed, which decides the data."""
        return [
            list(seed[start : start + size])
            for seed in _by_seed(trials)
            for size in [-(-len(seed) // -(-len(seed) // self.width))]
            for start in range(0, len(seed), size)
        ]

    def course(self, trial: Trial) -> Course:
        """A run's steps."""
        train, num_shards = self.material.train, self.placement.num_shards
        return Course(trial.config, trial.loss, train, num_shards)

    def training(self, trial: Trial) -> Training:
        """What a run would be trained with alone; nothing of it is compiled yet."""
        return make_training(
            trial.config,
            trial.loss,
            self.material.loaded,
            self._policy(trial),
            self._mesh,
            self.num_steps,
        )

    def note(self, trial: Trial) -> dict[str, Any]:
        """What makes a run the same run."""
        identity, num_seen = (
            self.material.reference_identity,
            self.course(trial).num_seen,
        )
        return make_note(trial.config, self._fingerprint, num_seen, identity)

    def names(self, trial: Trial) -> Names:
        """What a run measures."""
        number = self._numbers[trial.config.loss]
        return self._objectives.names(number, self._measured, self._batch)

    @cached_property
    def _measured(self) -> Measured:
        """Shapes of what is measured of a batch."""
        policy = self.material.policy
        reference = policy.reference if self.frozen is None else self.frozen
        return self.stacked.measured(policy.trained, reference, self._batch)

    def lanes(self, trials: Sequence[Trial]) -> Lanes:
        """What differs between runs, on the devices; idle lanes repeat the first."""
        every = [*trials, *[trials[0]] * (self.width - len(trials))]
        return as_lanes(
            [self._numbers[trial.config.loss] for trial in every],
            [self._learning_rate(trial) for trial in every],
        )

    def whole(self, trained: Params, trial: Trial) -> tuple[Params, Params | None]:
        """A run's policy and its reference, where it needs one that does not move."""
        policy = self._policy(trial)
        return policy.whole(trained), policy.reference

    def _learning_rate(self, trial: Trial) -> float:
        default = default_learning_rate(trial.loss, self.material.loaded)
        return largest_learning_rate(trial.config.optimizer, default)

    def _policy(self, trial: Trial) -> Policy:
        seed = trial.config.seed
        if seed not in self._policies:
            policy, loaded = self.material.policy, self.material.loaded
            self._policies[seed] = of_seed(
                policy, loaded, self.config, self._mesh, seed
            )
        policy = self._policies[seed]
        needs_reference = "reference" in trial.loss.needs
        return policy if needs_reference else policy._replace(reference=None)

    def _fitting(self, most: int, memory: float) -> int:
        """The width of the fewest equal programs that fit."""
        for num_programs in range(1, most + 1):
            width = math.ceil(most / num_programs)
            if needed(partial(self.compile_step, width)) <= SHARE * memory:
                return width
        raise ValueError(
            f"Not even one run fits a device's {memory / 2**30:.3g} GiB, of which a "
            "tenth is left free; see dpojax train --fit for what would."
        )

    def compile_step(self, width: int) -> jax.stages.Compiled:
        """The step of so many runs at one time, from shapes alone."""
        stacked, where = self._make(num_lanes=width), rows_sharding(self._mesh)
        batch = jax.tree.map(
            lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=where),
            self._batch,
        )
        lanes, frozen = as_lanes([0] * width, [0.0] * width), self.frozen
        frozen = jax.tree.map(abstract, frozen)
        return stacked.step.lower(stacked.shapes, lanes, frozen, batch).compile()


def _by_seed(trials: Sequence[Trial]) -> list[list[Trial]]:
    seeds: dict[int, list[Trial]] = {}
    for trial in trials:
        seeds.setdefault(trial.config.seed, []).append(trial)
    return list(seeds.values())
