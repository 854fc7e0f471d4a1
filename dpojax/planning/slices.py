"""TPU slices that are not there: their devices, as the compiler in libtpu knows them.

This file knows no programs.
"""

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from dpojax.planning.chips import Slice

# Without them libtpu looks for a machine, or complains that it finds none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans side by side
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def slice_devices(wanted: Slice) -> list[Any]:
    """Devices to compile for; none of them exists.

    Raises:
      ValueError: without libtpu, or for a slice that it does not know.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "To compile for a TPU that is not there takes its compiler, libtpu; "
            "install it by pip install 'dpojax[plan]'."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A host of a single chip is the one kind that libtpu does not take for granted.
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if wanted.num_chips == 1 else {}
    try:
        found = topologies.get_topology_desc(wanted.name, platform="tpu", **bounds)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"libtpu knows no slice {wanted.name}: {reason}; give one of the shapes in "
            f"https://docs.cloud.google.com/tpu/docs/{wanted.chip.name}."
        ) from error
    devices = list(found.devices)
    if len(devices) != wanted.num_chips:
        raise ValueError(
            f"libtpu has {len(devices)} devices for the {wanted.num_chips} chips of "
            f"{wanted.name}; give another shape."
        )
    return devices
