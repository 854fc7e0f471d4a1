"""How often a loop turns: its counter followed from its start until it ends.

The compiler knows most loops' numbers of turns and does not always print them. This
file computes a loop's condition turn by turn, from the few integers that it depends on,
and knows nothing else.
"""

import operator
import re
from collections.abc import Callable

from dpojax.planning.hlo import Computation, Instruction, Program

_MOST_TURNS = 100_000
_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")
# An element of what a computation is given: (number of the argument, place in its
# tuple or None) -> its value
Given = Callable[[int, int | None], int]


def num_turns(
    program: Program, inside: Computation, loop: Instruction, given: Given
) -> int:
    """Turns of a ``while``.

    Args:
      program: whose loop it is.
      inside: the computation that holds it.
      loop: the instruction.
      given: the values that `inside` is given, as `inside_loop` makes it for loops in
        loops.

    Raises:
      ValueError: if they depend on data, or on an operation that is not followed.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known is not None:
        return int(known.group(1))
    condition = program.computations[str(loop.called("condition"))]
    state = _loop_state(program, inside, loop, given)
    for turn in range(_MOST_TURNS):

        def now(_: int, place: int | None, turn: int = turn) -> int:
            return state(place, turn)

        if not evaluate(program, condition, condition.root, now):
            return turn
    raise ValueError(f"The loop {loop.name} does not end within {_MOST_TURNS} turns.")


def inside_loop(
    program: Program, inside: Computation, loop: Instruction, given: Given
) -> Given:
    """What a loop's body is given, of what stays the same from turn to turn.

    What changes is refused: an inner loop that turned more and more often would be
    counted wrongly.
    """
    state = _loop_state(program, inside, loop, given)

    def invariant(_: int, place: int | None) -> int:
        if state(place, 0) != state(place, 1):
            raise ValueError("A loop's number of turns changes with that of another.")
        return state(place, 0)

    return invariant


def passed_on(
    program: Program, inside: Computation, instruction: Instruction, given: Given
) -> Given:
    """What a call or a fusion gives to its computation."""

    def passed(number: int, place: int | None) -> int:
        source = inside.instructions[instruction.operands[number]]
        if place is None:
            return evaluate(program, inside, source, given)
        return _of_tuple(program, inside, source, place, given)

    return passed


def callee(program: Program, instruction: Instruction) -> Computation:
    """The computation of a call or a fusion."""
    name = instruction.called("calls") or instruction.called("to_apply")
    return program.computations[str(name)]


def unknown(argument: int, place: int | None) -> int:
    """What the entry of a program is given: data."""
    raise ValueError("A loop's number of turns depends on data.")


def evaluate(
    program: Program, inside: Computation, instruction: Instruction, given: Given
) -> int:
    """The value of one integer.

    Raises:
      ValueError: if it depends on data, or on an operation that is not followed.
    """

    def operand(number: int) -> int:
        return evaluate(
            program, inside, inside.instructions[instruction.operands[number]], given
        )

    opcode = instruction.opcode
    if opcode == "constant":
        return _constant(instruction)
    if opcode == "parameter":
        return given(int(instruction.literal), None)
    if opcode in _SAME:
        return operand(0)
    if opcode in _BINARY:
        return _BINARY[opcode](operand(0), operand(1))
    if opcode == "compare":
        compare = _COMPARE[str(instruction.attribute("direction"))]
        return int(compare(operand(0), operand(1)))
    if opcode == "select":
        return operand(1 if operand(0) else 2)
    if opcode == "get-tuple-element":
        return _element(program, inside, instruction, given)
    if opcode in ("fusion", "call"):
        called = callee(program, instruction)
        passed = passed_on(program, inside, instruction, given)
        return evaluate(program, called, called.root, passed)
    raise ValueError(
        f"A loop's number of turns depends on the operation {opcode!r}, which is not "
        "followed."
    )


def _element(
    program: Program, inside: Computation, instruction: Instruction, given: Given
) -> int:
    place = int(str(instruction.attribute("index")))
    source = inside.instructions[instruction.operands[0]]
    return _of_tuple(program, inside, source, place, given)


def _of_tuple(
    program: Program,
    inside: Computation,
    source: Instruction,
    place: int,
    given: Given,
) -> int:
    if source.opcode == "parameter":
        return given(int(source.literal), place)
    if source.opcode == "tuple":
        element = inside.instructions[source.operands[place]]
        return evaluate(program, inside, element, given)
    if source.opcode == "while":
        turns = num_turns(program, inside, source, given)
        return _loop_state(program, inside, source, given)(place, turns)
    if source.opcode in (*_SAME, "opt-barrier"):
        below = inside.instructions[source.operands[0]]
        return _of_tuple(program, inside, below, place, given)
    raise ValueError(
        f"A loop's number of turns depends on a result of {source.opcode!r}, which is "
        "not followed."
    )


def _loop_state(
    program: Program, inside: Computation, loop: Instruction, given: Given
) -> Callable[[int | None, int], int]:
    """``(place in the tuple, turn) -> value`` before that turn."""
    body = program.computations[str(loop.called("body"))]
    initial = inside.instructions[loop.operands[0]]
    known: dict[tuple[int, int], int] = {}

    def state(place: int | None, turn: int) -> int:
        assert place is not None
        if (place, turn) not in known:
            known[place, turn] = first(place) if turn == 0 else after(place, turn - 1)
        return known[place, turn]

    def first(place: int) -> int:
        return _of_tuple(program, inside, initial, place, given)

    def after(place: int, turn: int) -> int:
        def before(_: int, other: int | None) -> int:
            return state(other, turn)

        return _of_tuple(program, body, body.root, place, before)

    return state


def _constant(instruction: Instruction) -> int:
    text = instruction.literal.strip()
    if text in ("true", "false"):
        return int(text == "true")
    if not re.fullmatch(r"-?\d+", text):
        raise ValueError(
            f"A loop's number of turns depends on the constant {text[:40]!r}, which is "
            "no integer."
        )
    return int(text)
