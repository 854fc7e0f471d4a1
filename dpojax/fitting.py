"""Settings of memory: those that cannot be are refused, those left open are found.

This file joins settings with `dpojax.fit`, which knows none.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from dpojax.config import TrainConfig
from dpojax.fit import Way, choose, describe, device_memory, ways
from dpojax.loading import Loaded
from dpojax.losses.make import Loss
from dpojax.policy import Policy, computed
from dpojax.progress import busy, say
from dpojax.reference_setting import named_reference
from dpojax.sharding import num_row_shards, rows_sharding
from dpojax.training import make_training


def check_memory(config: TrainConfig, loss: Loss) -> float | None:
    """Refuses settings of memory that cannot be or have no effect.

    Returns:
      With ``--fit``, the bytes of a device before anything is on it; else None.

    Raises:
      ValueError: naming the setting and what to do.
    """
    if "reference" in config.offload:
        if "reference" not in loss.needs:
            raise ValueError(
                f"The loss {loss.name!r} uses no reference to be offloaded; leave out "
                "--offload reference."
            )
        if named_reference(config.reference).is_precomputed:
            raise ValueError(
                "A precomputed reference is on no device; leave out --offload "
                "reference."
            )
        if config.moving.kind != "none":
            raise ValueError(
                "A reference that moves is part of the state, and stays on the device; "
                "leave out --offload reference or --moving."
            )
    offloads = bool(config.offload) or config.remat == "offload"
    if offloads and jax.default_backend() == "cpu":
        say("A CPU's devices have no memory of their own: offloading saves nothing.")
    if not config.fit:
        if config.memory_limit is not None:
            raise ValueError("--memory-limit is what --fit may use; give --fit too.")
        return None
    if config.remat is not None:
        raise ValueError("--fit chooses what is recomputed; leave out --remat.")
    if config.memory_limit is not None and config.memory_limit <= 0:
        raise ValueError(
            f"memory_limit is {config.memory_limit} GiB; it must be positive."
        )
    return device_memory(config.memory_limit)


def fit(
    config: TrainConfig,
    loss: Loss,
    loaded: Loaded,
    policy: Policy,
    mesh: Mesh,
    *,
    num_steps: int,
    limit: float,
    first_batch: Callable[[int], Any],
) -> TrainConfig:
    """The settings with the fastest way of computing a step that fits.

    Args:
      config: settings that leave it open.
      loss: the objective.
      loaded: the model.
      policy: what of it is trained.
      mesh: where everything is.
      num_steps: of the whole run.
      limit: bytes of a device.
      first_batch: a number of microbatches to the first batch that is cut into them.

    Raises:
      ValueError: if none fits.
    """

    def compile_step(way: Way) -> jax.stages.Compiled:
        there = _decided(config, way)
        model = computed(loaded, there, mesh)
        training = make_training(there, loss, model, policy, mesh, num_steps)
        frozen = jax.tree.map(_shape, training.frozen)
        batch = jax.tree.map(rows, first_batch(way.num_microbatches))
        with busy(f"Compiling with --remat {way}"):
            return training.step.lower(training.shapes, frozen, batch).compile()

    def rows(array: Any) -> jax.ShapeDtypeStruct:
        where = rows_sharding(mesh)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    fewest = config.microbatches
    num_rows = len(first_batch(fewest).tokens)
    most = num_rows // num_row_shards(mesh)
    fitting = choose(ways(fewest, most), compile_step, limit)
    say(describe(fitting))
    return _decided(config, fitting.way)


def _decided(config: TrainConfig, way: Way) -> TrainConfig:
    return replace(
        config,
        remat=way.remat,
        microbatches=way.num_microbatches,
        fit=False,
        memory_limit=None,
    )


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
