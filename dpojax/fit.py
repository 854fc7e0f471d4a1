"""The fastest way of computing a step that fits a device's memory, found by compiling.

Nothing is allocated or run: the compiler says what a program needs. This file knows
neither models nor settings; it is given a function that compiles a step.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpojax.models.remat import Remat

GIB = 2**30
# Beside the step there are evaluation, samples, and gaps between arrays.
SHARE = 0.9
# From the one that recomputes least to the one that keeps least. Not "offload": to wait
# for the host costs more than more microbatches, which need less memory too.
_FASTEST_FIRST: tuple[Remat, ...] = (
    "none", "dots", "dots_except_up", "save_attention", "full",
)  # fmt: skip


class Way(NamedTuple):
    """A way of computing the same step."""

    remat: Remat
    num_microbatches: int

    def __str__(self) -> str:
        parts = self.num_microbatches
        return self.remat if parts == 1 else f"{self.remat} in {parts} microbatches"


class Fitting(NamedTuple):
    """A way that fits, and what it took to find it."""

    way: Way
    needs: dict[Way, float]  # bytes of a device, of all that were tried; inf: unknown
    limit: float


def ways(num_microbatches: int, most_microbatches: int) -> Iterator[Way]:
    """What to try, from the fastest to the leanest.

    Args:
      num_microbatches: to begin with, under every policy.
      most_microbatches: of which each still has a row for every device.
    """
    for remat in _FASTEST_FIRST:
        yield Way(remat, num_microbatches)
    while 2 * num_microbatches <= most_microbatches:
        num_microbatches *= 2
        yield Way("full", num_microbatches)


def choose(
    tried: Iterator[Way],
    compile_step: Callable[[Way], jax.stages.Compiled],
    limit: float,
) -> Fitting:
    """The first way whose program fits.

    Args:
      tried: ways of computing a step, the best first.
      compile_step: compiles a step from shapes alone.
      limit: bytes of a device, of which nine tenths may be used.

    Raises:
      ValueError: if none fits, naming the least that is needed.
    """
    needs: dict[Way, float] = {}
    for way in tried:
        needs[way] = needed(partial(compile_step, way))
        if needs[way] <= SHARE * limit:
            return Fitting(way, needs, limit)
    least = min(needs, key=lambda way: needs[way])
    raise ValueError(
        f"A step does not fit a device's {limit / GIB:.3g} GiB, of which a tenth is "
        f"left free: the leanest way, {least}, needs {_in_gib(needs[least])}; lower "
        "--batch-size or --max-length, share the model by --mesh.fsdp, keep less by "
        "--optimizer.moments or --offload, or train adapters by --lora.rank."
    )


def describe(fitting: Fitting) -> str:
    """One line: what was chosen, and the figures."""
    way, needs, limit = fitting
    others = [
        f"{other} {_in_gib(need)}" for other, need in needs.items() if other != way
    ]
    rejected = f"; too much: {', '.join(others)}" if others else ""
    return (
        f"fit: {way}, {_in_gib(needs[way])} of a device's {limit / GIB:.3g} GiB"
        f"{rejected}"
    )


def device_memory(limit: float | None) -> float:
    """Bytes that a device may use, the same number in every process.

    Args:
      limit: in GiB; None: what the device has or, of a CPU, its share of what the
        machine has left.

    Raises:
      ValueError: where it is not known.
    """
    if limit is not None:
        return limit * GIB
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    own = stats.get("bytes_limit")
    if own is None and device.platform == "cpu":
        own = _available() / jax.local_device_count()
    if own is None:
        raise ValueError(
            f"The memory of a {device.device_kind} is not known; give --memory-limit."
        )
    return float(np.min(multihost_utils.process_allgather(np.float32(own))))


def needed(compile_step: Callable[[], jax.stages.Compiled]) -> float:
    """Bytes of a device that a program takes; infinite beyond the compiler's limit.

    Raises:
      ValueError: where the compiler does not say.
    """
    try:
        found = compile_step().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return math.inf  # more than the compiler's own limit
        raise
    if found is None:
        raise ValueError("This backend's compiler does not say what a program needs.")
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes  # what is donated is there once
        + found.temp_size_in_bytes
    )


def _in_gib(need: float) -> str:
    return f"{need / GIB:.3g} GiB" if math.isfinite(need) else "more than there is"


def _available() -> float:
    """Bytes of the machine that are not in use."""
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * float(line.split()[1])
    raise ValueError("The machine does not say its free memory; give --memory-limit.")
