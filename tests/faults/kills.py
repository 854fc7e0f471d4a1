"""Runs that are killed at random moments and resumed until they end; what they leave.

A run goes on in processes of its own. These begin as copies of one that has imported
everything and computed nothing, since importing would take most of their time.
"""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from many_processes import free_port
from test_run import metrics_of

from dpojax.checkpoint import Newest, find_newest
from dpojax.config import DistributedConfig, TrainConfig

_SECONDS = 300  # after which a process hangs
_STARTUP = 0.2  # of the time of a run: there is nothing yet that a kill could spoil


@dataclass
class Kills:
    """How many kills met a run, and what it was about then."""

    before: int = 0  # its first step
    training: int = 0
    saving: int = 0  # a checkpoint had no name yet

    @property
    def total(self) -> int:
        """All of them."""
        return self.before + self.training + self.saving


def prepare() -> None:
    """Says what the process has imported that the others are copies of."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["dpojax.run", "dpojax.cli", "kills"])


def run_whole(config: TrainConfig, num_processes: int = 1) -> float:
    """A run that nobody disturbs; its seconds."""
    start = time.monotonic()
    processes = _start(config, num_processes)
    for process in processes:
        process.join(_SECONDS)
    _check_ended(processes, config)
    return time.monotonic() - start


def run_killed(
    config: TrainConfig,
    num_processes: int,
    seconds: float,
    at_most: int,
    chance: random.Random,
) -> Kills:
    """A run that ends in the end.

    Args:
      config: of a new run.
      num_processes: all are killed at once.
      seconds: that a whole run takes; each try is killed within that time.
      at_most: kills, after which it is left alone.
      chance: decides when.
    """
    kills = Kills()
    directory = Path(str(config.output))
    while True:
        resumed = (directory / "config.py").is_file()
        processes = _start(replace(config, resume=resumed), num_processes)
        if kills.total == at_most:
            break
        processes[0].join(chance.uniform(_STARTUP * seconds, seconds))
        if not processes[0].is_alive():
            break
        _count(kills, directory)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    for process in processes:
        process.join(_SECONDS)
    _check_ended(processes, config)
    return kills


def _count(kills: Kills, directory: Path) -> None:
    names = [path.name for path in directory.glob("checkpoints/*")]
    if any(not name.isdecimal() for name in names):
        kills.saving += 1
    elif names:
        kills.training += 1
    else:
        kills.before += 1


def assert_same_run(one: Path, other: Path) -> None:
    """Every number that two runs leave is the same, but for how fast they were."""
    for name in ("model.safetensors", "adapter_model.safetensors"):
        files = [directory / "final" / name for directory in (one, other)]
        assert files[0].exists() == files[1].exists()
        if files[0].exists():
            assert files[0].read_bytes() == files[1].read_bytes()
    assert metrics_of(one) == metrics_of(other)
    names = ("samples.jsonl", "held_out.jsonl", "warnings.jsonl", "config.py")
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    newest = [find_newest(directory / "checkpoints") for directory in (one, other)]
    assert newest[0] == newest[1] == Newest(newest[0].step, {})
    assert best_of(one) == best_of(other)


def best_of(directory: Path) -> tuple[float, int]:
    """The lowest evaluation loss of the checkpoints that are kept, and its step."""
    found = directory.glob("checkpoints/*/metrics/metrics")
    return min(
        (json.loads(path.read_text())["loss"], int(path.parts[-3])) for path in found
    )


def run_command(arguments: list[str], log: Path, jump: float) -> tuple[int | None, str]:
    """Runs `dpojax`; how it ends, and what it says to standard error.

    Args:
      arguments: of the command.
      log: a file for what it says.
      jump: seconds, as `clock` takes them.
    """
    server = multiprocessing.get_context("forkserver")
    process = server.Process(target=_command, args=(arguments, log, jump))
    process.start()
    process.join(_SECONDS)
    process.kill()
    return process.exitcode, log.read_text(encoding="utf-8")


@contextmanager
def clock(jump: float) -> Iterator[None]:
    """At every reading the time of day is so many seconds further off than before."""
    now, calls = time.time, []

    def jumping() -> float:
        calls.append(None)
        return now() + jump * len(calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", jumping)
        patch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
        yield
        assert len(calls) > 4


def _command(arguments: list[str], log: Path, jump: float) -> None:
    from dpojax.cli import main

    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    with clock(jump):
        main(arguments)


def _start(config: TrainConfig, num_processes: int) -> list[ForkServerProcess]:
    server = multiprocessing.get_context("forkserver")
    address = f"localhost:{free_port()}"
    started = []
    for number in range(num_processes):
        own = config
        if num_processes > 1:
            joined = DistributedConfig(
                method=address, num_processes=num_processes, process=number
            )
            own = replace(config, distributed=joined)
        log = Path(f"{config.output}.{number}.log")
        started.append(server.Process(target=_run, args=(own, log)))
        started[-1].start()
    return started


def _run(config: TrainConfig, log: Path) -> None:
    """In a process of its own, on two devices: what it says goes to a file."""
    from dpojax.run import run

    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run(config)


def _check_ended(processes: list[ForkServerProcess], config: TrainConfig) -> None:
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    logs = [Path(f"{config.output}.{n}.log").read_text() for n in range(len(codes))]
    assert codes == [0] * len(codes), "\n".join(logs)
