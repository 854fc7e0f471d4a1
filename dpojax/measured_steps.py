"""Steps in the training loop's own order, each timed from completion to completion.

A step is waited for when the next one has been dispatched, as the loop does it, so that
what the devices wait for the host is in the time. This file knows no settings.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpojax import metrics
from dpojax.batch import Batch
from dpojax.memory_peaks import host_peak, reset_host_peak
from dpojax.precision import precision_of
from dpojax.sharding import Placement, put_ahead
from dpojax.train_step import TrainState
from dpojax.training import Training


class Program(NamedTuple):
    """The step, compiled for one shape of batches."""

    run: jax.stages.Compiled
    seconds: float  # of tracing and compiling it


class Step(NamedTuple):
    """A step that was taken."""

    batch: Batch  # on the host
    seconds: float
    loss: float


class Taken(NamedTuple):
    """Steps and the programs that took them."""

    steps: list[Step]
    programs: list[Program]
    first: list[int]  # which steps were the first of their program
    host_peak: int | None = None  # bytes, before the measured steps


def take_steps(
    training: Training,
    state: TrainState,
    batches: Iterator[Batch],
    placement: Placement,
    *,
    num_unmeasured: int,
    trace: str | None = None,
) -> Taken:
    """Takes a step for each batch.

    Args:
      training: the step and what it takes.
      state: before the first step; the step takes it over.
      batches: prepared as for training.
      placement: how rows reach the devices.
      num_unmeasured: steps before the profile, and before the peak of the host's
        memory begins anew.
      trace: directory for a profile; None: there is none.
    """
    assert isinstance(training.step, jax.stages.Wrapped)
    programs: dict[tuple, Program] = {}
    taken = Taken([], [], [])
    peak: int | None = None
    dispatched: list[tuple[Batch, metrics.Sums]] = []
    since = time.perf_counter()

    def finish() -> None:
        nonlocal since
        batch, sums = dispatched.pop(0)
        loss = metrics.summarize({"loss": sums["loss"]})["loss"]
        now = time.perf_counter()
        taken.steps.append(Step(batch, now - since, loss))
        since = now

    with ExitStack() as profile:
        for number, (batch, placed) in enumerate(put_ahead(batches, placement.put)):
            if number == num_unmeasured:
                peak = host_peak()
                reset_host_peak()
                if trace is not None:
                    profile.enter_context(jax.profiler.trace(trace))
            shapes = tuple(array.shape for array in jax.tree.leaves(batch))
            if shapes not in programs:
                while dispatched:
                    finish()
                arguments = state, training.frozen, placed
                programs[shapes] = _compile(training.step, arguments)
                taken.first.append(number)
                since = time.perf_counter()
            state, sums = programs[shapes].run(state, training.frozen, placed)
            dispatched.append((batch, sums))
            if len(dispatched) == 2:
                finish()
        while dispatched:
            finish()
    return taken._replace(programs=list(programs.values()), host_peak=peak)


def _compile(step: jax.stages.Wrapped, arguments: tuple) -> Program:
    start = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    return Program(compiled, time.perf_counter() - start)


def measure_ceiling(dtype: Any) -> float:
    """FLOP/s of the fastest of a few large matrix products, all devices together.

    They are as precise as the model's own: in float32 whole, on accelerators too.
    """
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("device",))
    rows = PartitionSpec("device")
    precision = precision_of(dtype)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.dot(left, right, precision=precision)

    is_cpu = jax.default_backend() == "cpu"
    best = 0.0
    for size in (1024, 2048, 3072) if is_cpu else (2048, 4096, 8192):
        shape = len(devices) * size, size
        where = jax.sharding.NamedSharding(mesh, rows)
        make = jax.jit(
            lambda key, shape=shape: jax.random.normal(key, shape, dtype),
            out_shardings=where,
        )
        left, right = (make(jax.random.key(seed)) for seed in range(2))
        product(left, right).block_until_ready()
        for _ in range(4):
            start = time.perf_counter()
            product(left, right).block_until_ready()
            seconds = time.perf_counter() - start
            best = max(best, 2 * size**3 * len(devices) / seconds)
    return best
