"""The step of a configuration, compiled for devices that are not there, and read.

It is the step that `dpojax.training` puts together for a run, of shapes alone.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dpojax.batch import Batch
from dpojax.command_config import PlanConfig
from dpojax.loading import Loaded
from dpojax.losses.make import Loss
from dpojax.planning.flash_work import flash_flops
from dpojax.planning.hlo import Instruction, Program, parse
from dpojax.planning.rows import scored_chunks
from dpojax.planning.walk import Counts, count
from dpojax.policy import Policy
from dpojax.sharding import num_row_shards, rows_sharding
from dpojax.training import Training, make_training


class Memory(NamedTuple):
    """The compiler's account of one chip, bytes."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take an argument's place
    temporaries: int
    # At one time, at most: less than the sum, where temporaries take the place of
    # arguments that are given away and not needed any more.
    peak: int


class Buffer(NamedTuple):
    """One array of a chip."""

    bytes: float
    what: str


class Compiled(NamedTuple):
    """A step that fits, and what one chip does in it."""

    memory: Memory
    counts: Counts
    flash_flops: float  # of the flash kernels, which the compiler cannot count
    temporaries: list[Buffer]  # the largest

    @property
    def flops(self) -> float:
        """Of products of matrices, the kernels' included."""
        return self.counts.flops + self.flash_flops


class TooLarge(NamedTuple):
    """A step that the compiler found no room for."""

    reason: str  # its own figures


class Planned(NamedTuple):
    """A step before it is compiled."""

    training: Training
    arguments: tuple[Any, Any, Any]  # shapes: the state, what is frozen, the batch
    batch: Batch  # on the host
    loaded: Loaded
    policy: Policy
    config: PlanConfig
    mesh: Mesh


def plan_step(
    config: PlanConfig,
    loss: Loss,
    loaded: Loaded,
    policy: Policy,
    mesh: Mesh,
    batch: Batch,
    num_steps: int,
) -> Planned:
    """Puts a step together; nothing is compiled."""
    training = make_training(config, loss, loaded, policy, mesh, num_steps)
    where = rows_sharding(mesh)
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch
    )
    arguments = training.shapes, training.frozen, rows
    return Planned(training, arguments, batch, loaded, policy, config, mesh)


def compile_step(planned: Planned) -> Compiled | TooLarge:
    """Compiles a step and counts what a chip does in it.

    Raises:
      ValueError: if the program does something whose cost is not known.
    """
    try:
        compiled = planned.training.step.lower(*planned.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooLarge(_reason(str(error)))
    found = compiled.memory_analysis()
    assert found is not None  # TPUs' compiler tells
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.peak_memory_in_bytes,
    )
    program = parse(_text(compiled))
    counts = count(program, _ChunkLoop(planned))
    by_flash = flash_flops(counts.kernels, planned.batch, planned.loaded.model.config)
    return Compiled(memory, counts, by_flash, largest_temporaries(program))


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            "The step compiles, but this jax cannot read the programs of this libtpu; "
            "install the one that belongs to it by pip install 'dpojax[plan]'."
        ) from error
    assert text is not None
    return text


def argument_buffers(planned: Planned) -> list[Buffer]:
    """Every array that the step is given, per chip, the largest first."""
    names = ("state", "reference", "batch")
    found = []
    for name, tree in zip(names, planned.arguments, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            key = jax.tree_util.keystr(path, simple=True, separator="/")
            found.append(Buffer(chip_bytes(leaf, leaf.sharding), f"{name}/{key}"))
    return sorted(found, reverse=True)


def chip_bytes(leaf: Any, sharding: Any) -> float:
    """Bytes of one chip's part of an array."""
    shape = sharding.shard_shape(leaf.shape)
    return float(np.prod(shape, dtype=float)) * leaf.dtype.itemsize


def largest_temporaries(program: Program, number: int = 5) -> list[Buffer]:
    """The largest results in a chip's memory; they need not be there at one time."""
    found: dict[str, float] = {}
    for computation in program.computations.values():
        if "fused" in computation.name:
            continue
        for one in computation.instructions.values():
            if one.opcode in _NO_RESULT:
                continue
            for shape in one.shapes:
                if shape.memory_space == 0:
                    size = "x".join(map(str, shape.dimensions))
                    what = f"{shape.dtype}[{size}] {_origin(one)}"
                    found[what] = shape.bytes
    buffers = [Buffer(size, what) for what, size in found.items()]
    return _distinct(sorted(buffers, reverse=True), number)


_NO_RESULT = frozenset(
    {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "copy-start"}
)


def _distinct(buffers: Iterable[Buffer], number: int) -> list[Buffer]:
    """The first of each size."""
    by_size: dict[float, Buffer] = {}
    for buffer in buffers:
        by_size.setdefault(buffer.bytes, buffer)
    return list(by_size.values())[:number]


def _origin(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    parts = [] if found is None else found.group(1).split("/")
    kept = [part for part in parts if part not in _UNTOLD]
    return "/".join(kept[-3:]) or instruction.opcode


_UNTOLD = ("jit(train_step)", "while", "body", "closed_call", "jvp()")


class _ChunkLoop:
    """How often the head's loop over chunks of scored positions turns."""

    def __init__(self, planned: Planned):
        rows, length = planned.batch.tokens.shape
        parts = planned.config.microbatches
        shards, contexts = num_row_shards(planned.mesh), planned.mesh.shape["context"]
        positions = rows * length // shards // parts // contexts
        self.chunk = min(planned.config.chunk_size, positions)
        self.turns = scored_chunks(planned.batch, shards, parts, self.chunk, contexts)

    def __call__(self, loop: Instruction) -> float:
        if any(self.chunk in shape.dimensions for shape in loop.shapes):
            return self.turns
        raise ValueError(
            f"The loop {loop.name} of the compiled step turns as often as data say, and"
            " is not that over scored positions; nothing is counted."
        )


def _reason(text: str) -> str:
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text)
    if found is None:
        return text.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    return f"needs {found.group(1)}iB of {found.group(2)}iB"
