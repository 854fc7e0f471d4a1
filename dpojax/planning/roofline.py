"""The least time of a step by what it must do, and what follows from it.

A step takes at least as long as the longest of its products at the chip's peak, its
memory's traffic and its collectives at full speed, as if each hid behind the others.
This file knows numbers only.

References:
  Williams, Waterman and Patterson, Roofline, 2009, doi:10.1145/1498765.1498785.
"""

from typing import NamedTuple


class Roofline(NamedTuple):
    """Seconds of a step, by what is waited for."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The least time of a step."""
        return max(self)

    @property
    def bound(self) -> str:
        """What takes it."""
        return self._fields[self.index(self.seconds)]


def make_roofline(
    *,
    flops: float,
    memory_bytes: float,
    sent_bytes: float,
    peak_flops: float,
    memory_speed: float,
    interconnect_speed: float,
) -> Roofline:
    """Of one chip.

    Args:
      flops: of products, in a step.
      memory_bytes: read from and written to its memory.
      sent_bytes: that it sends to other chips.
      peak_flops: a second.
      memory_speed: bytes a second.
      interconnect_speed: bytes a second; 0 for a chip alone.
    """
    return Roofline(
        flops / peak_flops,
        memory_bytes / memory_speed,
        sent_bytes / interconnect_speed if sent_bytes else 0.0,
    )


class Speed(NamedTuple):
    """What a step takes at a share of the roofline's speed."""

    efficiency: float
    step_seconds: float
    tokens_per_second: float
    flops_utilization: float  # model FLOPs over what all chips could do


def speed_at(
    efficiency: float,
    roofline: Roofline,
    *,
    tokens: float,
    model_flops: float,
    peak_flops: float,
) -> Speed:
    """Times at a stated efficiency.

    Args:
      efficiency: share of the roofline's speed that is reached.
      roofline: of the step.
      tokens: of a step.
      model_flops: of a step, on all chips.
      peak_flops: a second, of all chips.

    Raises:
      ValueError: for an efficiency outside of (0, 1].
    """
    if not 0 < efficiency <= 1:
        raise ValueError(
            f"The efficiency {efficiency:g} is no share of the roofline; give numbers "
            "above 0 and at most 1."
        )
    seconds = roofline.seconds / efficiency
    return Speed(
        efficiency, seconds, tokens / seconds, model_flops / seconds / peak_flops
    )
