"""How the processes of a run find each other, and how soon they miss one that dies.

JAX's coordination service, in process 0, hears from every process all the time. One
that falls silent is named to the others, as "Task 2 heartbeat timeout", and these end;
if process 0 is the one that died, they say so and end at once. A process that fails by
itself says why, waits a while for the others, and takes them along.

Programs that call `jax.distributed.initialize` themselves leave the settings at
"none". This file knows no model and no data.
"""

import os
import socket

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpojax.config import DistributedConfig
from dpojax.progress import be_quiet, say

_HEARTBEAT = 20  # seconds of silence after which a process counts as dead
_SHUTDOWN = 30  # seconds for which a process that leaves waits for the others
_VARIABLES = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def connect(config: DistributedConfig) -> None:
    """Connects to the other processes, if settings say that there are any.

    To be called before anything is computed. Afterwards only process 0 says anything
    but errors.

    Raises:
      ValueError: for an address or numbers that cannot be or have no effect; if there
        is no cluster, or there is one of which the settings say nothing.
    """
    numbers = config.num_processes, config.process
    if ":" in config.method:
        _join(config.method, *numbers)
    elif numbers != (None, None):
        raise ValueError(
            "--num-processes and --process go with --distributed HOST:PORT; "
            f"--distributed {config.method} takes none."
        )
    elif config.method == "none":
        _check_alone()
    elif config.method in ("auto", "mpi4py"):
        _join_cluster(None if config.method == "auto" else config.method)
    else:
        raise ValueError(
            f"--distributed is {config.method!r}; give none, auto, mpi4py or HOST:PORT "
            "of process 0."
        )
    if jax.process_count() > 1:
        if jax.process_index() != 0:
            be_quiet()
        say(f"{jax.process_count()} processes: {_places()}")


def _join(address: str, num_processes: int | None, process: int | None) -> None:
    """Joins so many processes, of which process 0 is at the address."""
    given = [
        os.environ.get(variable, "") if number is None else number
        for number, variable in zip((num_processes, process), _VARIABLES, strict=True)
    ]
    try:
        count, own = (int(number) for number in given)
    except ValueError:
        raise ValueError(
            f"--distributed {address} needs --num-processes and --process, or "
            f"{' and '.join(_VARIABLES)} in the environment: whole numbers."
        ) from None
    if not 0 <= own < count:
        raise ValueError(
            f"--process is {own} of --num-processes {count}; they are numbered from 0."
        )
    jax.distributed.initialize(
        address,
        count,
        own,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=_SHUTDOWN,
    )


def _join_cluster(method: str | None) -> None:
    """Joins the processes that JAX finds; None: by whatever it detects."""
    try:
        jax.distributed.initialize(
            cluster_detection_method=method,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except ValueError as error:
        raise ValueError(
            f"JAX finds no cluster here ({error}); start the command on one that it "
            "knows (Cloud TPU, GKE, Slurm, Open MPI, MPI with mpi4py), or give "
            "--distributed HOST:PORT, --num-processes and --process."
        ) from error


def _check_alone() -> None:
    """Refuses hosts of a TPU slice that see each other's chips but are not connected.

    Raises:
      ValueError: then; without a word, they would wait for each other for ever.
    """
    if not jax.distributed.is_initialized() and jax.process_count() > 1:
        raise ValueError(
            f"The devices here belong to {jax.process_count()} processes; start the "
            "same command on every host, with --distributed auto."
        )


def _places() -> str:
    """Which process is where, so that one that is named by its number can be found."""
    own = socket.gethostname().encode()[:64].ljust(64)
    names = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
    return ", ".join(
        f"{number} on {bytes(name).decode(errors='replace').strip()}"
        for number, name in enumerate(np.asarray(names))
    )
