"""What a run and a benchmark put together alike: examples, state, optimiser and step.

This file reads settings, so that a benchmark times what training does; it knows no loop
and no files.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpojax.beginning import begin, state_shapes
from dpojax.config import TrainConfig
from dpojax.examination import Examine, make_examine
from dpojax.gradient import Judge, as_judge
from dpojax.loading import Loaded
from dpojax.losses.make import Loss
from dpojax.losses.objective import Need
from dpojax.measure import Measure, make_measure
from dpojax.models.families import aux_loss_coefficient
from dpojax.offloading import fetch_state
from dpojax.policy import Policy, default_learning_rate
from dpojax.prepare import (
    configured_optimizer,
    configured_schedule,
)
from dpojax.reference import Movement
from dpojax.reference_setting import make_movement
from dpojax.sharding import rows_sharding
from dpojax.spread import Spread
from dpojax.train_step import TrainState, TrainStep, Update, jit_step, make_update


class Training(NamedTuple):
    """What the loop needs beside the state to take steps."""

    step: TrainStep
    examine: Examine  # of a step that was not finite
    frozen: Any  # the step's second argument
    # Of each step; computed once, since in the loop it would wait behind the steps that
    # the devices still have to take.
    learning_rates: np.ndarray
    shapes: TrainState  # the state's, with shardings
    begin: Callable[[], TrainState]  # makes it; the policy's arrays become part of it


def make_training(
    config: TrainConfig,
    loss: Loss,
    loaded: Loaded,
    policy: Policy,
    mesh: Mesh,
    num_steps: int,
) -> Training:
    """Puts the train step together; nothing is compiled or allocated.

    Args:
      config: the settings.
      loss: the objective.
      loaded: the model.
      policy: what of it is trained.
      mesh: where everything is.
      num_steps: of the whole run, which decides the schedule.

    Raises:
      ValueError: for settings of the optimiser or of a moving reference that cannot be.
    """
    movement = make_movement(config.moving, loss)
    rate = default_learning_rate(loss, loaded)
    schedule = configured_schedule(config.optimizer, rate, num_steps)
    optimizer = configured_optimizer(config.optimizer, schedule)
    parts = (policy.trained, policy.reference, optimizer, loss, movement)
    shapes = state_shapes(*parts, mesh, config.offload)
    measure = configured_measure(config, loss.needs, loaded, mesh)
    examine = make_examine(
        loaded.model.trace,
        measure,
        loss,
        policy.roles,
        num_microbatches=config.microbatches,
        aux_loss_coefficient=aux_loss_coefficient(loaded.settings),
        out_sharding=NamedSharding(mesh, PartitionSpec()),
    )
    step = jit_step(
        configured_update(
            config, measure, as_judge(loss), optimizer, loaded, policy, movement
        ),
        jax.tree.map(lambda shape: shape.sharding, shapes),
        rows_sharding(mesh),
    )
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(num_steps)))
    # A reference that moves is in the state.
    frozen = None if movement is not None else policy.frozen
    return Training(
        step, examine, frozen, rates, shapes, partial(begin, *parts, shapes)
    )


def configured_measure(
    config: TrainConfig, needs: frozenset[Need], loaded: Loaded, mesh: Mesh
) -> Measure:
    """What settings measure of a batch, for losses that need so much."""
    return make_measure(
        loaded.model.apply,
        needs,
        token_metrics=config.token_metrics,
        chunk_size=config.chunk_size,
        spread=Spread(mesh),
        # A reference of adapters has their base, so that both begin alike.
        begin=loaded.model.begin,
    )


def configured_update(
    config: TrainConfig,
    measure: Measure,
    objective: Judge,
    optimizer: optax.GradientTransformation,
    loaded: Loaded,
    policy: Policy,
    movement: Movement | None,
) -> Update:
    """The step that settings describe, not jitted; see `make_update`."""
    return make_update(
        measure,
        objective,
        optimizer,
        num_microbatches=config.microbatches,
        movement=movement,
        roles=policy.roles,
        aux_loss_coefficient=aux_loss_coefficient(loaded.settings),
        on_nan=config.on_nan,
        around=fetch_state if "optimizer" in config.offload else lambda one: one,
    )
