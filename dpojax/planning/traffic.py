"""Bytes that one operation reads from and writes to a device's memory.

Operands are read once and results written once; of what is sliced or updated in place,
only the part. What a compiler keeps in faster memory is not counted, nor what tiles
pad. This file knows no loops.
"""

import math

from dpojax.planning.hlo import Computation, Instruction, Program, Shape

MAIN, HOST = 0, 5  # memory spaces
_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
        "conditional", "call", "call-start", "after-all", "partition-id", "replica-id",
        "opt-barrier", "async-start", "async-update", "async-done",
        "add-dependency", "domain", "copy-done", "slice-done",
    }
)  # fmt: skip
_SLICES = ("slice", "dynamic-slice", "gather")


def traffic(
    program: Program, inside: Computation, instruction: Instruction, space: int = MAIN
) -> float:
    """Bytes of one operation, a whole fusion being one.

    Args:
      program: holds what it calls.
      inside: the computation that holds it.
      instruction: the operation.
      space: which memory.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    if opcode == "slice-start":
        part = instruction.shapes[1]
        source = next(inside.operands(instruction)).shapes[0]
        return part.bytes * sum(one.memory_space == space for one in (source, part))
    if opcode.endswith("-start"):
        # Operands and results, and words of the machine's own.
        return _bytes(instruction.shapes, space)
    if opcode == "fusion":
        called = program.computations[str(instruction.called("calls"))]
        return _fusion(program, inside, instruction, called, space)
    operands = list(inside.operands(instruction))
    if opcode in _SLICES:
        is_there = [
            shape.memory_space == space
            for shape in (operands[0].shapes[0], instruction.shapes[0])
        ]
        return instruction.shapes[0].bytes * sum(is_there)
    if opcode == "dynamic-update-slice":
        update, whole = operands[1].shapes[0], instruction.shapes[0]
        is_there = [shape.memory_space == space for shape in (update, whole)]
        return update.bytes * sum(is_there)
    read = {one.name: _bytes(one.shapes, space) for one in operands}
    return math.fsum(read.values()) + _bytes(instruction.shapes, space)


def _fusion(
    program: Program,
    inside: Computation,
    instruction: Instruction,
    called: Computation,
    space: int,
) -> float:
    read = 0.0
    for given, parameter in zip(
        inside.operands(instruction), called.parameters, strict=True
    ):
        whole = _bytes(given.shapes, space)
        read += min(whole, _read(program, called, parameter)) if whole else 0.0
    parts = _results(called, called.root)
    if len(parts) != len(instruction.shapes):
        return read + _bytes(instruction.shapes, space)
    written = [
        min(part, shape.bytes)
        for part, shape in zip(parts, instruction.shapes, strict=True)
        if shape.memory_space == space
    ]
    return read + math.fsum(written)


def _read(program: Program, inside: Computation, source: Instruction) -> float:
    """Bytes of an array that a fused computation reads."""
    total = 0.0
    for user in inside.users[source.name]:
        first = user.operands[0] == source.name
        if user.opcode in _SLICES and first:
            total += user.shapes[0].bytes
        elif user.opcode == "dynamic-update-slice" and first:
            continue  # updated in place
        elif user.opcode == "bitcast":
            total += _read(program, inside, user)
        elif user.opcode == "fusion":
            called = program.computations[str(user.called("calls"))]
            for place, operand in enumerate(user.operands):
                if operand == source.name:
                    total += _read(program, called, called.parameters[place])
        else:
            return _all(source.shapes)
    return total


def _results(inside: Computation, root: Instruction) -> list[float]:
    """Bytes of each array that a fused computation writes."""
    if root.opcode == "tuple":
        elements = inside.operands(root)
        return [part for one in elements for part in _results(inside, one)]
    if root.opcode == "bitcast":
        return _results(inside, next(inside.operands(root)))
    if root.opcode == "dynamic-update-slice":
        update = inside.instructions[root.operands[1]]
        return [update.shapes[0].bytes]
    return [shape.bytes for shape in root.shapes]


def _bytes(shapes: tuple[Shape, ...], space: int) -> float:
    return _all(tuple(shape for shape in shapes if shape.memory_space == space))


def _all(shapes: tuple[Shape, ...]) -> float:
    return math.fsum(shape.bytes for shape in shapes)
