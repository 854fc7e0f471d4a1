"""What one device does in a run of a program, loops counted turn by turn.

XLA's cost analysis counts a loop's body once. This walk multiplies by the turns, and
refuses a loop whose number of turns it cannot tell. It knows no hardware.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from dpojax.planning.collectives import is_collective, sent
from dpojax.planning.hlo import Computation, Instruction, Program, Shape
from dpojax.planning.products import product_flops
from dpojax.planning.scalars import (
    Given,
    callee,
    inside_loop,
    num_turns,
    passed_on,
    unknown,
)
from dpojax.planning.traffic import HOST, MAIN, traffic

# A loop whose number of turns depends on data, to that number.
DataTurns = Callable[[Instruction], float]
# Custom calls of the compilers' own that compute nothing.
_NO_WORK = frozenset(
    {
        "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone",
        "AsyncCollectiveStart", "ConcatBitcast", "Sharding", "SliceToDynamic",
        "PadToStatic", "annotate_device_placement", "MoveToHost", "MoveToDevice",
        "PrepareAsyncCallStart", "PrepareAsyncCallDone",
    }
)  # fmt: skip


# What begins elsewhere, and is waited for later, is called where it begins.
_CALLS = ("call", "call-start", "async-start")


class Kernel(NamedTuple):
    """A custom call, which only its author can count."""

    name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]


@dataclass
class Counts:
    """Of one device in one run."""

    flops: float = 0.0  # of products of matrices
    memory_bytes: float = 0.0
    host_bytes: float = 0.0  # that go between the device and its host
    sent_bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_sent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    # And how often each runs.
    kernels: dict[Kernel, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: "Counts") -> None:
        """Counts both."""
        self.flops += other.flops
        self.memory_bytes += other.memory_bytes
        self.host_bytes += other.host_bytes
        for kind, value in other.sent_bytes.items():
            self.sent_bytes[kind] += value
            self.num_sent[kind] += other.num_sent[kind]
        for kernel, times in other.kernels.items():
            self.kernels[kernel] += times


def refuse_data(loop: Instruction) -> float:
    """For programs in which no loop may depend on data."""
    raise ValueError(
        f"The loop {loop.name} turns as often as data say, which the program does not "
        "hold; say how often."
    )


def count(program: Program, data_turns: DataTurns = refuse_data) -> Counts:
    """Walks a program.

    Args:
      program: as `dpojax.planning.hlo.parse` gives it.
      data_turns: how often a loop turns whose number of turns depends on data.

    Raises:
      ValueError: for a loop whose number of turns is not known.
    """
    counts = Counts()
    _Walk(program, data_turns, counts).through(program.entry, 1.0, unknown)
    return counts


class _Walk(NamedTuple):
    program: Program
    data_turns: DataTurns
    counts: Counts

    def through(
        self, inside: Computation, times: float, given: Given, is_fused: bool = False
    ) -> None:
        for instruction in inside.instructions.values():
            self.visit(inside, instruction, times, given, is_fused)

    def visit(
        self,
        inside: Computation,
        instruction: Instruction,
        times: float,
        given: Given,
        is_fused: bool,
    ) -> None:
        opcode, counts, program = instruction.opcode, self.counts, self.program
        if not is_fused:
            for_memory = traffic(program, inside, instruction, MAIN)
            counts.memory_bytes += times * for_memory
            counts.host_bytes += times * traffic(program, inside, instruction, HOST)
        if opcode in ("dot", "convolution"):
            counts.flops += times * product_flops(inside, instruction)
        elif is_collective(inside, instruction):
            found = sent(inside, instruction, program.num_devices)
            counts.sent_bytes[found.kind] += times * found.bytes
            counts.num_sent[found.kind] += times
        elif opcode == "custom-call":
            self.custom(inside, instruction, times)
        elif opcode == "while":
            self.loop(inside, instruction, times, given)
        elif opcode == "conditional":
            self.branches(instruction, times, given)
        elif opcode in ("fusion", *_CALLS):
            passed = passed_on(program, inside, instruction, given)
            called = callee(program, instruction)
            self.through(called, times, passed, is_fused or opcode == "fusion")

    def loop(
        self, inside: Computation, loop: Instruction, times: float, given: Given
    ) -> None:
        try:
            turns = float(num_turns(self.program, inside, loop, given))
        except ValueError:
            turns = self.data_turns(loop)
        body = self.program.computations[str(loop.called("body"))]
        self.through(
            body, times * turns, inside_loop(self.program, inside, loop, given)
        )

    def branches(self, instruction: Instruction, times: float, given: Given) -> None:
        """Of several branches the one that does most."""
        found = []
        for name in _branches(instruction):
            counts = Counts()
            walk = self._replace(counts=counts)
            walk.through(self.program.computations[name], times, unknown)
            found.append(counts)
        most = max(found, key=lambda one: (one.flops, one.memory_bytes))
        self.counts.add(most)

    def custom(
        self, inside: Computation, instruction: Instruction, times: float
    ) -> None:
        target = str(instruction.attribute("custom_call_target")).strip('"')
        if target in _NO_WORK:
            return
        name = _kernel_name(instruction) or target
        operands = tuple(
            shape for one in inside.operands(instruction) for shape in one.shapes
        )
        self.counts.kernels[Kernel(name, operands, instruction.shapes)] += times


def _branches(instruction: Instruction) -> list[str]:
    listed = instruction.attribute("branch_computations")
    if listed is not None:
        return [name.strip(" {}%") for name in listed.split(",")]
    names = (instruction.called(f"{one}_computation") for one in ("true", "false"))
    return [str(name) for name in names]


def _kernel_name(instruction: Instruction) -> str | None:
    """A Pallas kernel's own name, where the program tells it."""
    found = re.search(r'/([\w.]+)/pallas_call"', instruction.attributes)
    return None if found is None else found.group(1)
