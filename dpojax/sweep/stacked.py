"""The states of many runs as one, stacked by seed and combination, and their steps.

The step is that of a single run, mapped over seeds with their batches, and of each over
states, objectives and learning rates. What is not mapped the compiler sees once: the
frozen weights, and a seed's batch. So with adapters a reference costs one forward pass
a seed, however many runs it has, and products with the base are of all runs' hidden
states together. This file knows no files.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dpojax.batch import Batch
from dpojax.config import TrainConfig
from dpojax.loading import Loaded
from dpojax.measure import Measured
from dpojax.metrics import Sums
from dpojax.policy import Policy
from dpojax.prepare import configured_optimizer, configured_schedule
from dpojax.reference import Movement
from dpojax.sharding import ROWS
from dpojax.sweep.extent import Extent
from dpojax.sweep.objectives import Objectives
from dpojax.train_step import TrainState
from dpojax.training import configured_measure, configured_update


class Lanes(NamedTuple):
    """What differs between runs, beside their states."""

    objective: Int[Array, "seeds combinations"]  # its number
    learning_rate: Float[Array, "seeds combinations"]  # the largest


class Place(NamedTuple):
    """Where a run is in stacked arrays."""

    seed: int
    combination: int


class Stacked(NamedTuple):
    """Compiled functions of all runs' states."""

    shapes: TrainState  # stacked, with shardings
    rows: NamedSharding  # of batches stacked by seed
    # (stacked, lanes, frozen, batches) -> (stacked, sums); the state is donated
    step: jax.stages.Wrapped
    # (stacked, lanes, frozen, batch) -> sums and figures of each example, of one batch
    assess: Callable[[TrainState, Lanes, Any, Batch], tuple[Sums, Sums]]
    empty: Callable[[], TrainState]
    take: Callable[[TrainState, Place], TrainState]  # of a run
    put: Callable[[TrainState, Place, TrainState], TrainState]  # the first is donated
    # (trained, frozen, batch) -> shapes of what is measured
    measured: Callable[[Any, Any, Batch], Measured]


def make_stacked(
    config: TrainConfig,
    objectives: Objectives,
    loaded: Loaded,
    policy: Policy,
    mesh: Mesh,
    *,
    num_steps: int,
    movement: Movement | None,
    shapes: TrainState,
    extent: Extent,
) -> Stacked:
    """Puts the functions together; nothing is compiled or allocated.

    Args:
      config: settings that all runs share.
      objectives: the runs' losses.
      loaded: the model.
      policy: what of it is trained.
      mesh: where everything is.
      num_steps: of each run, which decides the schedule.
      movement: how each run's reference moves, if it does.
      shapes: of one run's state, with shardings, and with all losses' statistics.
      extent: runs at one time.
    """
    measure = configured_measure(config, objectives.needs, loaded, mesh)
    unit = replace(config.optimizer, learning_rate=1.0)
    share = configured_schedule(unit, 1.0, num_steps)

    def step(
        state: TrainState, lanes: Lanes, frozen: Any, batches: Batch
    ) -> tuple[TrainState, Sums]:
        def one(
            state: TrainState, lane: Lanes, batch: Batch
        ) -> tuple[TrainState, Sums]:
            def schedule(count: Any) -> Any:
                return lane.learning_rate * share(count)

            update = configured_update(
                config,
                measure,
                objectives.judge(lane.objective),
                configured_optimizer(config.optimizer, schedule),
                loaded,
                policy,
                movement,
            )
            return update(state, frozen, batch)

        of_seed = jax.vmap(one, in_axes=(0, 0, None))
        return jax.vmap(of_seed)(state, lanes, batches)

    def measured(trained: Any, frozen: Any, batch: Batch) -> Measured:
        return measure(*policy.evaluated(trained, frozen, jnp.int32(0)), batch)

    def assess(
        state: TrainState, lanes: Lanes, frozen: Any, batch: Batch
    ) -> tuple[Sums, Sums]:
        def one(state: TrainState, lane: Lanes) -> tuple[Sums, Sums]:
            found = measured(state.params, state.moving.get("reference", frozen), batch)
            return objectives.assess(lane.objective, found, batch, state.running)

        return jax.vmap(jax.vmap(one))(state, lanes)

    rows = NamedSharding(mesh, PartitionSpec(None, *ROWS))
    stacked = jax.tree.map(lambda shape: _stacked(shape, extent), shapes)
    where, of_one = (
        jax.tree.map(lambda shape: shape.sharding, tree) for tree in (stacked, shapes)
    )

    def empty() -> TrainState:
        return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), stacked)

    def take(state: TrainState, place: Place) -> TrainState:
        return jax.tree.map(lambda array: array[*place], state)

    def put(state: TrainState, place: Place, one: TrainState) -> TrainState:
        return jax.tree.map(lambda all_, new: all_.at[*place].set(new), state, one)

    return Stacked(
        shapes=stacked,
        rows=rows,
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(where, None, None, rows),
            out_shardings=(where, None),
        ),
        assess=jax.jit(assess),
        empty=jax.jit(empty, out_shardings=where),
        take=jax.jit(take, out_shardings=of_one),
        put=jax.jit(put, donate_argnums=0, out_shardings=where),
        measured=lambda *args: jax.eval_shape(measured, *args),
    )


def as_lanes(
    objectives: Sequence[Sequence[int]], learning_rates: Sequence[Sequence[float]]
) -> Lanes:
    """Those of runs, of each seed a sequence, as arrays."""
    return Lanes(
        jnp.asarray(objectives, jnp.int32), jnp.asarray(learning_rates, jnp.float32)
    )


def _stacked(shape: Any, extent: Extent) -> jax.ShapeDtypeStruct:
    """All runs are on every device, each divided as a single run's state."""
    spec = PartitionSpec(None, None, *shape.sharding.spec)
    sharding = NamedSharding(shape.sharding.mesh, spec)
    return jax.ShapeDtypeStruct((*extent, *shape.shape), shape.dtype, sharding=sharding)
