"""The state before the first step: its shapes, and each array where it is kept.

This file knows neither the loop nor the configuration.
"""

from collections.abc import Collection
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from dpojax.losses.make import Loss
from dpojax.offloading import on_host
from dpojax.reference import Movement, Params
from dpojax.sharding import as_shardings
from dpojax.train_step import TrainState, init_state


def state_shapes(
    trained: Params,
    reference: Params | None,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    movement: Movement | None,
    mesh: Mesh,
    offload: Collection[str] = (),
) -> TrainState:
    """Shapes and shardings of the state; nothing is allocated.

    Args:
      trained: what is trained.
      reference: what a moving reference starts from.
      optimizer: its statistics are part of the state.
      loss: its statistics too, where it has any.
      movement: how the reference moves, if it does.
      mesh: where everything is.
      offload: with ``"optimizer"``, its statistics are in the host's memory.
    """

    def make(trained: Params, reference: Params | None) -> TrainState:
        moving = {} if movement is None else movement.init(trained, reference)
        return init_state(trained, optimizer, loss, moving)

    shapes = jax.eval_shape(make, trained, reference)
    where = as_shardings(shapes, mesh)
    if "optimizer" in offload:
        where = where._replace(opt_state=on_host(where.opt_state, shapes.opt_state))
    return jax.tree.map(_placed, shapes, where)


def begin(
    trained: Params,
    reference: Params | None,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    movement: Movement | None,
    shapes: TrainState,
) -> TrainState:
    """The state itself; the arrays that are trained are part of it, not copied.

    Args:
      trained: what is trained.
      reference: what a moving reference starts from.
      optimizer: makes its statistics.
      loss: likewise.
      movement: how the reference moves, if it does.
      shapes: as `state_shapes` gives them.
    """
    where = jax.tree.map(lambda x: x.sharding, shapes)
    moving = {} if movement is None else movement.init(trained, reference)
    init = jax.jit(optimizer.init, out_shardings=where.opt_state)
    state = TrainState(
        jax.numpy.zeros((), "int32"),
        jax.numpy.zeros((), bool),
        trained,
        init(trained),
        loss.initial_running(),
        moving,
    )
    return jax.device_put(state, where)


def _placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
