"""The text of a compiled program, taken apart: computations, instructions, shapes.

It reads what ``compiled.as_text()`` prints, and knows nothing of what an operation
costs.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COMMENT = re.compile(r"/\*.*?\*/")
_BITS = re.compile(r"\d+")


class Shape(NamedTuple):
    """One array of a program."""

    dtype: str
    dimensions: tuple[int, ...]
    memory_space: int  # 0 is a device's main memory; of TPUs 5 is the host's

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> float:
        """Without what tiles pad."""
        return self.size * _width(self.dtype)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # one; of a tuple its arrays
    operands: tuple[str, ...]  # names of instructions of the same computation
    literal: str  # between the parentheses: of a constant its value
    attributes: str

    def attribute(self, name: str) -> str | None:
        """The value of ``name=value`` up to the next attribute, if it is there."""
        found = re.search(rf"(?:^|[ ,]){name}=(\{{[^}}]*\}}|[^ ,]+)", self.attributes)
        return None if found is None else found.group(1)

    def called(self, name: str) -> str | None:
        """The computation that an attribute names."""
        value = self.attribute(name)
        return None if value is None else value.lstrip("%")


@dataclass(frozen=True)
class Computation:
    """A function of a program."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction those that take it."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    @cached_property
    def parameters(self) -> list[Instruction]:
        """In the order in which callers give them."""
        found = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.literal))

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        """What an instruction takes."""
        return (self.instructions[name] for name in instruction.operands)


class Program(NamedTuple):
    """A compiled module, as one of its devices runs it."""

    computations: dict[str, Computation]
    entry: Computation
    num_devices: int


def parse(text: str) -> Program:
    """Takes a program's text apart.

    Raises:
      ValueError: if it is none.
    """
    computations: dict[str, Computation] = {}
    entry = None
    lines = iter(text.splitlines())
    header = next(lines, "")
    for line in lines:
        head = _HEAD.match(line)
        if head is not None:
            found = _parse_computation(head.group(2), lines)
            computations[found.name] = found
            entry = found if head.group(1) else entry
    if entry is None:
        raise ValueError(
            "This text has no ENTRY computation; give that of a compiled program."
        )
    counts = re.findall(r"(?:replica_count|num_partitions)=(\d+)", header)
    return Program(computations, entry, math.prod(map(int, counts)))


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type as it is printed; no tokens."""
    return tuple(
        Shape(dtype, _dimensions(dimensions), _memory_space(layout))
        for dtype, dimensions, layout in _SHAPE.findall(text)
        if dtype != "token"
    )


def _parse_computation(name: str, lines: Iterator[str]) -> Computation:
    instructions: dict[str, Instruction] = {}
    root = None
    for line in lines:
        if line.startswith("}"):
            break
        if " = " in line:
            found = _parse_instruction(_COMMENT.sub("", line.strip()))
            instructions[found.name] = found
            root = found if line.lstrip().startswith("ROOT ") else root
    if root is None:
        raise ValueError(f"The computation {name} has no result.")
    return Computation(name, instructions, root)


def _parse_instruction(line: str) -> Instruction:
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    call = rest[end:].lstrip()
    opening = call.index("(")
    closing = _closing(call, opening)
    literal = call[opening + 1 : closing]
    opcode = call[:opening]
    takes_none = opcode in ("constant", "parameter")
    return Instruction(
        name.strip().lstrip("%"),
        opcode,
        parse_shapes(rest[:end]),
        () if takes_none else tuple(_NAME.findall(literal)),
        literal,
        call[closing + 1 :],
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"A parenthesis is not closed: {text[:80]}")


def _dimensions(text: str) -> tuple[int, ...]:
    return tuple(int(part.lstrip("<=")) for part in text.split(",") if part)


def _memory_space(layout: str) -> int:
    found = _SPACE.search(layout)
    return 0 if found is None else int(found.group(1))


def _width(dtype: str) -> float:
    """Bytes of one number."""
    if dtype in ("pred", "opaque"):
        return 1.0
    bits = _BITS.search(dtype)
    if bits is None:
        raise ValueError(f"A program has numbers of the unknown type {dtype!r}.")
    return int(bits.group()) / 8
