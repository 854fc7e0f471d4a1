"""What public documents say of chips, and how a slice's chips are linked.

Memory in GiB as named there, speeds in 10^9 or 10^12 a second, FLOPs of products in
bfloat16 without sparsity. This file knows no programs.

References:
  TPUs: https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; speed of one link:
  Austin et al., How to Scale Your Model, 2025, part 2, "TPU specs",
  https://jax-ml.github.io/scaling-book/tpus. Of v5e and v6e an axis of 16 chips is a
  ring, of v4 and v5p axes of a slice whose sizes are multiples of 4.
  GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM; DGX A100 and DGX
  H100, eight GPUs a machine, one 200 Gb/s (A100) or 400 Gb/s adapter each.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip; a GPU is one too."""

    name: str
    kind: Literal["tpu", "gpu"]
    memory: float  # bytes
    flops: float  # of products in bfloat16, a second
    memory_speed: float  # bytes a second
    link_speed: float  # bytes a second that one link carries one way; of a GPU all
    num_axes: int = 0  # of the torus
    ring: int = 0  # an axis of a multiple of so many chips is closed to a ring
    network_speed: float = 0.0  # of a GPU's own adapter, beyond its machine


def _tpu(
    name: str, gib: float, teraflops: float, memory_speed: float, link_speed: float,
    *, num_axes: int, ring: int,
) -> Chip:  # fmt: skip
    return Chip(
        name=name, kind="tpu", memory=gib * GIB, flops=teraflops * 1e12,
        memory_speed=memory_speed * 1e9, link_speed=link_speed * 1e9,
        num_axes=num_axes, ring=ring,
    )  # fmt: skip


def _gpu(
    name: str, gigabytes: float, teraflops: float, memory_speed: float,
    link_speed: float, network_speed: float,
) -> Chip:  # fmt: skip
    return Chip(
        name=name, kind="gpu", memory=gigabytes * 1e9, flops=teraflops * 1e12,
        memory_speed=memory_speed * 1e9, link_speed=link_speed * 1e9,
        network_speed=network_speed * 1e9,
    )  # fmt: skip


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 32, 275, 1200, 45, num_axes=3, ring=4),
        _tpu("v5e", 16, 197, 819, 45, num_axes=2, ring=16),
        _tpu("v5p", 95, 459, 2765, 90, num_axes=3, ring=4),
        _tpu("v6e", 32, 918, 1638, 90, num_axes=2, ring=16),
        _gpu("a100", 80, 312, 2039, 300, 25),
        _gpu("h100", 80, 989, 3350, 450, 50),
        _gpu("h200", 141, 989, 4800, 450, 50),
    )
}
GPUS_PER_MACHINE = 8


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Chips that are rented together."""

    chip: Chip
    sizes: tuple[int, ...]  # of the axes; of GPUs their number

    @property
    def num_chips(self) -> int:
        """All of them."""
        return math.prod(self.sizes)

    @property
    def name(self) -> str:
        """As a user gives it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"

    @property
    def interconnect_speed(self) -> float:
        """Bytes a second that a chip sends, and receives, over all its links.

        Of the chip with fewest links, at a corner where an axis is no ring.
        """
        chip = self.chip
        if chip.kind == "gpu":
            if self.num_chips <= GPUS_PER_MACHINE:
                return chip.link_speed
            # What enters a machine once is handed on inside it.
            return min(chip.link_speed, GPUS_PER_MACHINE * chip.network_speed)
        whole = all(size % chip.ring == 0 for size in self.sizes)
        links = 0
        for size in self.sizes:
            is_ring = whole if chip.num_axes == 3 else size % chip.ring == 0
            links += 0 if size == 1 else 2 if is_ring else 1
        return links * chip.link_speed


def read_slice(topology: str) -> Slice:
    """A slice by its name, ``v5e:4x8``, ``v5p:4x4x4`` or ``h100:8``.

    Raises:
      ValueError: for a chip or a shape that is not known.
    """
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", topology)
    chip = CHIPS.get(found.group(1)) if found is not None else None
    if found is None or chip is None:
        raise ValueError(
            f"The topology {topology!r} is not known; give a chip and the shape of its "
            f"slice, such as v5e:4x8, v5p:4x4x4 or h100:8; there are "
            f"{', '.join(CHIPS)}."
        )
    sizes = tuple(int(size) for size in found.group(2).split("x"))
    num_axes = chip.num_axes or 1
    if len(sizes) != num_axes or min(sizes) < 1:
        example = {1: "8", 2: "4x8", 3: "4x4x4"}[num_axes]
        raise ValueError(
            f"The topology {topology!r} has {len(sizes)} axes; slices of {chip.name} "
            f"have {num_axes}, such as {chip.name}:{example}."
        )
    return Slice(chip=chip, sizes=sizes)
