"""Devices in the shape of a mesh, over one slice of accelerators or several.

Inside a slice devices are joined by a fast network, between slices by a slow one. So
copies of the model are divided among slices, whose gradients meet once a step, and all
else stays inside. This file knows no model and no rows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

Devices = Sequence[Any]  # of jax.Device, which type checkers take for a variable


def arrange(sizes: Sequence[int], devices: Devices) -> np.ndarray:
    """Devices in an array, near ones along its last axes.

    Args:
      sizes: of the array, as many as there are devices. The first is of the axis that
        may cross from slice to slice.
      devices: what to arrange.

    Raises:
      ValueError: if the slices do not divide the first axis.
    """
    num_slices = count_slices(devices)
    names = tuple(map(str, range(len(sizes))))
    if num_slices == 1:
        return jax.make_mesh(tuple(sizes), names, devices=devices).devices
    inside, rest = divmod(sizes[0], num_slices)
    if rest:
        raise ValueError(
            f"The devices are in {num_slices} slices, which hold copies of the model; "
            f"--mesh.data is {sizes[0]} and must be a multiple of that."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (inside, *sizes[1:]),
        (num_slices, *(1 for _ in sizes[1:])),
        devices,
        allow_split_physical_axes=True,
    )


def count_slices(devices: Devices) -> int:
    """How many slices devices are in; those of CPUs and GPUs count as one."""
    if devices[0].platform != "tpu":
        return 1
    return len({_slice_of(device) for device in devices})


def _slice_of(device: Any) -> int:
    try:
        return device.slice_index
    except AttributeError:  # a device of the one slice that a program is compiled for
        return 0
