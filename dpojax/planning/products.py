"""FLOPs of one matrix product or convolution, from its shapes.

A product of a ``[m, k]`` and a ``[k, n]`` matrix takes ``2 m k n``. TPUs' compiler
writes products as convolutions, those of a batch with gaps between the inputs: places
where a window meets a gap or padding count nothing, as in XLA's own cost analysis.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from dpojax.planning.hlo import Computation, Instruction


def product_flops(inside: Computation, instruction: Instruction) -> float:
    """FLOPs of a ``dot`` or a ``convolution``.

    Args:
      inside: the computation that holds it.
      instruction: the operation.
    """
    left, right = (operand.shapes[0] for operand in inside.operands(instruction))
    result = instruction.shapes[0]
    if instruction.opcode == "dot":
        contracted = _numbers(instruction.attribute("lhs_contracting_dims"))
        depth = math.prod(left.dimensions[axis] for axis in contracted)
        return 2.0 * result.size * depth
    labels = str(instruction.attribute("dim_labels"))
    of_left, of_right, of_result = re.split(r"_|->", labels)
    inputs = right.dimensions[of_right.index("i")]
    outputs = result.dimensions[of_result.index("f")]
    batch = left.dimensions[of_left.index("b")]
    batch //= int(instruction.attribute("batch_group_count") or 1)
    places = 1
    for axis, window in enumerate(_windows(instruction)):
        label = str(axis)
        places *= _meetings(
            window,
            left.dimensions[of_left.index(label)],
            result.dimensions[of_result.index(label)],
        )
    return 2.0 * batch * inputs * outputs * places


class _Window(NamedTuple):
    """A convolution along one axis."""

    size: int
    stride: int
    before: int  # padding
    left_gap: int  # distance of inputs
    right_gap: int  # distance of a window's taps


def _windows(instruction: Instruction) -> list[_Window]:
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    if found is None or not found.group(1):
        return []
    parts = dict(part.split("=") for part in found.group(1).split())
    sizes = [int(size) for size in parts["size"].split("x")]

    def values(name: str) -> list[int]:
        if name not in parts:
            return [1] * len(sizes)
        return [int(value) for value in parts[name].split("x")]

    padding = parts["pad"].split("x") if "pad" in parts else ["0_0"] * len(sizes)
    before = [int(pad.split("_")[0]) for pad in padding]
    rows = zip(
        sizes,
        values("stride"),
        before,
        values("lhs_dilate"),
        values("rhs_dilate"),
        strict=True,
    )
    return [_Window(*row) for row in rows]


def _meetings(window: _Window, num_inputs: int, num_outputs: int) -> int:
    """Pairs of an output and a tap of its window that lies on an input."""
    outputs = np.arange(num_outputs)[:, None] * window.stride - window.before
    places = outputs + np.arange(window.size) * window.right_gap
    inside = (places >= 0) & (places <= (num_inputs - 1) * window.left_gap)
    return int(np.count_nonzero(inside & (places % window.left_gap == 0)))


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text or "")]
