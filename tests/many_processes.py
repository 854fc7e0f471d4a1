"""Commands in several processes at once, on one machine, for tests."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start(
    directory: Path,
    commands: Sequence[Sequence[str]],
    *,
    num_devices: int = 1,
    more: Sequence[dict[str, str]] | None = None,
) -> list[subprocess.Popen[bytes]]:
    """Starts Python once for each command; what each says goes to `log_of` it."""
    flags = (
        f"--xla_force_host_platform_device_count={num_devices}",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    started = []
    for number, command in enumerate(commands):
        with log_of(directory, number).open("w", encoding="utf-8") as log:
            started.append(
                subprocess.Popen(
                    (sys.executable, *command),
                    env=environment | ({} if more is None else more[number]),
                    stdout=log,
                    stderr=log,
                )
            )
    return started


def wait(started: Sequence[subprocess.Popen[bytes]], seconds: float = 600) -> list[int]:
    """The exit codes; whatever is left when one takes too long is killed."""
    try:
        return [process.wait(seconds) for process in started]
    finally:
        for process in started:
            process.kill()


def log_of(directory: Path, number: int) -> Path:
    """Where the process of a number says what it says."""
    return directory / f"process-{number}.log"


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
