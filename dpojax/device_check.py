"""Whether the devices of every process are there and add up: before a run, not in it.

    python -m dpojax.device_check --platform tpu --num-processes 4

on each of four workers says how many devices there are, or in one sentence what is
wrong. `tpu_setup.sh` ends with it; this file knows no model and no training.
"""

import sys
from typing import Literal

import jax
import numpy as np
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Platform = Literal["tpu", "gpu", "cpu"]


def check_devices(platform: Platform, num_processes: int = 1) -> str:
    """Joins the processes and sums over all their devices.

    Args:
      platform: what the devices must be.
      num_processes: how many must take part; above 1 they find each other as JAX finds
        them, by the metadata of a Cloud TPU, JobSet's variables or SLURM's.

    Returns:
      What was found, in one line.

    Raises:
      ValueError: if devices or processes are missing, or the sum is not the number of
        devices.
    """
    try:
        if num_processes > 1:
            jax.distributed.initialize()
        devices = jax.devices()
    except RuntimeError as error:  # JAX's own, of whatever lies below
        reason = " ".join(str(error).split())
        raise ValueError(
            f"JAX could not start {num_processes} processes on {platform}: {reason} "
            "Check that this runs on all of them at once, and that nothing else uses "
            "their devices."
        ) from error
    if devices[0].platform != platform:
        raise ValueError(
            f"No {platform} is visible, only {devices[0].platform}; install dpojax "
            f"with its {platform} extra, and end whatever else uses the devices."
        )
    if jax.process_count() != num_processes:
        raise ValueError(
            f"{jax.process_count()} processes take part instead of {num_processes}; "
            "run this on all of them at once."
        )
    total = sum_over_devices()
    if total != len(devices):
        raise ValueError(
            f"A sum of ones over {len(devices)} devices gave {total:g}; one of them or "
            "the network between them is broken, so take other machines."
        )
    return (
        f"{len(devices)} devices of kind {devices[0].device_kind} in "
        f"{num_processes} processes, {jax.local_device_count()} of them here; a sum "
        "over all of them is right."
    )


def sum_over_devices() -> float:
    """A one from each device of all processes, summed by a collective."""
    num_devices = jax.device_count()
    mesh = jax.make_mesh((num_devices,), ("all",), axis_types=(AxisType.Auto,))
    each = PartitionSpec("all")
    ones = jax.make_array_from_callback(
        (num_devices,),
        NamedSharding(mesh, each),
        lambda index: np.ones(num_devices, np.float32)[index],
    )
    add = jax.shard_map(
        lambda one: jax.lax.psum(one, "all"),
        mesh=mesh,
        in_specs=each,
        out_specs=PartitionSpec(),
    )
    return float(jax.jit(add)(ones).addressable_data(0)[0])


def main(platform: Platform = "tpu", num_processes: int = 1) -> None:
    """Checks the devices of this and all other processes.

    Args:
      platform: what the devices must be.
      num_processes: how many must take part.
    """
    try:
        print(check_devices(platform, num_processes), flush=True)
    except ValueError as error:
        print(f"device_check: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m dpojax.device_check")
