"""What the runs of one program share: model, data, and the compiled step of all.

This file reads settings; it knows no loop.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpojax.batch import Batch
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
from dpojax.sharding import make_placement, put_everywhere
from dpojax.sweep.extent import Block, Extent
from dpojax.sweep.grouping import Trial, representative
from dpojax.sweep.objectives import Names, Objectives
from dpojax.sweep.stacked import Lanes, Stacked, as_lanes, make_stacked
from dpojax.training import Training, make_training

Item = TypeVar("Item")


class Program:
    """Runs of one model on the same data, trained some at a time."""

    def __init__(
        self,
        trials: Sequence[Trial],
        mesh: Mesh,
        extents: Sequence[Extent],
        memory: float | None,
    ):
        """Loads what they share, and finds how many are trained at one time.

        Args:
          trials: the runs.
          mesh: where everything is.
          extents: so many or so many, the best first.
          memory: bytes of a device that must hold them; None: not to be asked.

        Raises:
          ValueError: for models and data that cannot be; if not even one run fits.
        """
        shared = representative(trials)
        self.config, self._mesh = shared.config, mesh
        self.material = load_material(shared.config, shared.loss, mesh)
        self.placement = make_placement(mesh)
        self._fingerprint = fingerprint(self.material.train)
        self._course = course = self.course(shared)
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
        self.extent = extents[0] if memory is None else self._fitting(extents, memory)
        self.stacked = self._make(extent=self.extent)
        loaded, test = self.material.loaded, self.material.test
        self.sampled = make_sample_writer(
            self.config, shared.loss, loaded, test, self.placement
        )

    def course(self, trial: Trial) -> Course:
        """A run's steps."""
        train, num_shards = self.material.train, self.placement.num_shards
        return Course(trial.config, trial.loss, train, num_shards)

    def batches(
        self, block: Block, start: int, stop: int
    ) -> Iterator[list[tuple[int, Batch]]]:
        """Of each step, every seed's batch and its number of tokens."""
        seeds = [some[0].config.seed for some in block]
        every, parts = _filled(seeds, self.extent.seeds), self.config.microbatches
        return self._course.batches_of_seeds(every, start, stop, parts)

    def put(self, counted: Sequence[tuple[int, Batch]]) -> Batch:
        """Sends the batches of a step off to the devices, stacked."""
        batches = [batch for _, batch in counted]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        where = jax.tree.map(lambda _: self.stacked.rows, stacked)
        return put_everywhere(stacked, where)

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

    def lanes(self, block: Block) -> Lanes:
        """What differs between runs, on the devices; idle lanes repeat the first."""
        wide = [_filled(some, self.extent.combinations) for some in block]
        every = _filled(wide, self.extent.seeds)
        return as_lanes(
            [[self._numbers[trial.config.loss] for trial in some] for some in every],
            [[self._learning_rate(trial) for trial in some] for some in every],
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

    def _fitting(self, extents: Sequence[Extent], memory: float) -> Extent:
        """The first that fits."""
        for extent in extents:
            if needed(partial(self.compile_step, extent)) <= SHARE * memory:
                return extent
        raise ValueError(
            f"Not even one run fits a device's {memory / 2**30:.3g} GiB, of which a "
            "tenth is left free; see dpojax train --fit for what would."
        )

    def compile_step(self, extent: Extent) -> jax.stages.Compiled:
        """The step of so many runs at one time, from shapes alone."""
        stacked = self._make(extent=extent)
        batches = jax.tree.map(
            lambda rows: jax.ShapeDtypeStruct(
                (extent.seeds, *rows.shape), rows.dtype, sharding=stacked.rows
            ),
            self._batch,
        )
        lanes = Lanes(jnp.zeros(extent, jnp.int32), jnp.zeros(extent))
        frozen = jax.tree.map(abstract, self.frozen)
        return stacked.step.lower(stacked.shapes, lanes, frozen, batches).compile()


def _filled(some: Sequence[Item], number: int) -> list[Item]:
    """So many, the first for those that are missing."""
    return [*some, *[some[0]] * (number - len(some))]
