"""What one collective sends over the interconnect, from its shapes and groups.

Bytes are those that each device sends, and receives, in the algorithm that sends least:
of ``n`` devices an all-gather or a reduce-scatter sends ``(n - 1) / n`` of the whole
array, an all-reduce twice that, an all-to-all ``(n - 1) / n`` of a device's own array,
and a permutation all of it.
"""

import math
import re
from typing import NamedTuple

from dpojax.planning.hlo import Computation, Instruction

_START = "AsyncCollectiveStart"


class Sent(NamedTuple):
    """What a device sends in one collective."""

    kind: str
    bytes: float


def sent(inside: Computation, instruction: Instruction, num_devices: int) -> Sent:
    """What each device sends, on average.

    Args:
      inside: the computation that holds it.
      instruction: a collective, or the start of one.
      num_devices: of the program.

    Raises:
      ValueError: for groups in a form that is not known.
    """
    kind = instruction.opcode.removesuffix("-start")
    own = math.fsum(
        shape.bytes for one in inside.operands(instruction) for shape in one.shapes
    )
    if kind == "collective-permute":
        found = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
        pairs = re.findall(r"\{(\d+),(\d+)", found.group(0) if found else "")
        moving = sum(source != target for source, target in pairs)
        return Sent(kind, own * moving / num_devices)
    if kind == "all-reduce" and _keeps_part(inside, instruction):
        kind = "reduce-scatter"
    size = group_size(instruction, num_devices)
    return Sent(kind, own * _SHARES[kind](size))


def _keeps_part(inside: Computation, instruction: Instruction) -> bool:
    """Whether of the sum each device is given a part only.

    In a fusion of its own, that is how TPUs' compiler writes a reduce-scatter of what
    its tiles do not divide.
    """
    root = inside.root
    return root.opcode == "dynamic-slice" and root.operands[0] == instruction.name


_SHARES = {
    "all-gather": lambda size: size - 1.0,  # of a device's own part
    "reduce-scatter": lambda size: (size - 1) / size,
    "all-reduce": lambda size: 2 * (size - 1) / size,
    "all-to-all": lambda size: (size - 1) / size,
    "ragged-all-to-all": lambda size: (size - 1) / size,
    "collective-broadcast": lambda size: (size - 1) / size,
}
KINDS = (*_SHARES, "collective-permute")


def is_collective(inside: Computation, instruction: Instruction) -> bool:
    """Whether a collective begins here.

    TPUs' compiler spreads one over a chain of fusions, each of which names it again:
    that of its start counts.
    """
    if instruction.opcode.removesuffix("-start") not in KINDS:
        return False
    if "chain_id=" not in instruction.attributes:
        return True
    return any(
        user.opcode == "custom-call" and f'"{_START}"' in user.attributes
        for user in inside.users[instruction.name]
    )


def group_size(instruction: Instruction, num_devices: int) -> int:
    """Devices that take part together.

    Raises:
      ValueError: for groups in a form that is not known.
    """
    text = instruction.attributes.partition("replica_groups=")[2]
    listed = re.match(r"\{\{([\d,]+)\}", text)
    if listed is not None:
        return len(listed.group(1).split(","))
    tiled = re.match(r"\[([\d,]+)\]<=", text)
    if tiled is not None:
        return int(tiled.group(1).split(",")[-1])
    named = re.match(r"@?mesh\w*\[(.*?)\](?:, device_ids=\S+)?\s*\{(.*?)\}", text)
    if named is not None:
        return _size_of_axes(*named.groups())
    if not text or text.startswith("{}"):
        return num_devices
    raise ValueError(f"The groups of a collective are not understood: {text[:80]}.")


def _size_of_axes(mesh: str, axes: str) -> int:
    """``'a'=4, 'b'=2`` and ``'a', 'b':(1)2`` to the product of the axes' sizes."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes)
    return math.prod(int(part) if part else sizes[name] for name, part in used)
