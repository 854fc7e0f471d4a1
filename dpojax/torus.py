"""What devices of a torus exchange of a matrix, one dimension of it after another.

Where the devices that share a matrix lie along more than one dimension of their
network, the TPUs' compiler makes an all-reduce of the reduce-scatter of its gradient
over all of them, and of gathering a small one: either sends twice as much. Over the
devices along one dimension it keeps what it is given, and these exchanges, one after
another, send what a single one would. This file knows axes and coordinates only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dpojax.slices import Devices

Groups = list[list[int]]  # places on an axis that exchange something with each other


class Line(NamedTuple):
    """An axis of a mesh; its functions are called on each device's own part."""

    axis: str
    # Along each dimension that the devices span; None: all of them in one exchange.
    phases: tuple[Groups | None, ...] = (None,)

    @property
    def is_box(self) -> bool:
        """Whether it is known which devices are along a dimension of a torus."""
        return None not in self.phases

    def gather(self, part: jax.Array, dimension: int) -> jax.Array:
        """The whole of what is divided along a dimension."""
        for groups in reversed(self.phases):
            part = jax.lax.all_gather(
                part, self.axis, axis=dimension, axis_index_groups=groups, tiled=True
            )
        return part

    def scatter(self, whole: jax.Array, dimension: int) -> jax.Array:
        """The sum over the devices, each keeping its part along a dimension."""
        for groups in self.phases:
            whole = jax.lax.psum_scatter(
                whole,
                self.axis,
                scatter_dimension=dimension,
                axis_index_groups=groups,
                tiled=True,
            )
        return whole


def make_line(mesh: Mesh, axis: str) -> Line:
    """How the devices of an axis lie; those of all its copies lie alike."""
    line = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    devices: Devices = line.reshape(len(line), -1)[:, 0].tolist()
    if devices[0].platform != "tpu":
        return Line(axis)
    return Line(axis, along_dimensions([device.coords for device in devices]))


def along_dimensions(
    coordinates: Sequence[Sequence[int]],
) -> tuple[Groups | None, ...]:
    """Places on an axis in groups along each dimension that its devices span.

    Args:
      coordinates: of the devices, in the order of the axis.

    Returns:
      Groups for each dimension, such that what is scattered over one kind of groups
      after another ends up in the order of the axis; a single None where the devices
      are not a box in the order of its dimensions.
    """
    places = np.arange(len(coordinates))
    found = []  # of each dimension: how far apart neighbours are, and each one's digit
    for values in np.asarray(coordinates).T:
        _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        if len(first) > 1:
            digits = np.argsort(np.argsort(first))[inverse]
            found.append((int(np.argmax(digits > 0)), digits))
    found.sort(key=lambda one: -one[0])
    if not np.array_equal(sum(stride * digits for stride, digits in found), places):
        return (None,)
    return tuple(
        [
            [int(place) + step * stride for step in range(int(digits.max()) + 1)]
            for place in places[digits == 0]
        ]
        for stride, digits in found
    )
