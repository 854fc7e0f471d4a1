"""Storage that fails, clocks that jump, a second run: a sentence, and nothing lost."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from kills import assert_same_run, clock, prepare, run_command
from test_run import metrics_of

from dpojax import checkpoint
from dpojax.checkpoint import find_newest
from dpojax.config import TrainConfig
from dpojax.run import run
from dpojax.run_directory import open_directory

pytestmark = pytest.mark.slow  # many runs

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def whole(config: TrainConfig) -> Path:
    """A run that nothing disturbs."""
    prepare()
    return run(config).directory


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, path: Path):
        self.path = path
        self._mount("size=64m")

    def _mount(self, options: str) -> None:
        command = ("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path))
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs the right to mount a file system in memory")

    def change(self, options: str) -> None:
        """Its size, or whether it can be written."""
        self._mount(f"remount,{options}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Unmounted in the end."""
    path = tmp_path / "disk"
    path.mkdir()
    disk = Disk(path)
    yield disk
    subprocess.run(("umount", "--lazy", str(path)), check=True)


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """What the command says to the user, once, when it ends with 2."""

    def refuse(config: TrainConfig, jump: float = 0) -> str:
        experiment = tmp_path / "experiment.py"
        names = "DistributedConfig, LoraConfig, LossConfig, MeshConfig, MovingConfig"
        experiment.write_text(
            f"from dpojax.config import {names}, OptimizerConfig, TrainConfig\n\n\n"
            f"def config():\n    return {config!r}\n"
        )
        code, said = run_command(["train", str(experiment)], tmp_path / "said", jump)
        assert code == 2 and said.startswith("dpojax: error: "), said
        assert said.count("\n") == 1, said
        return said

    return refuse


def test_a_full_disk_stops_a_run_which_goes_on_when_there_is_room(
    disk: Disk, whole: Path, config: TrainConfig, refused: Refused
):
    disk.change("size=3m")  # room for one checkpoint of two MB
    config = replace(config, output=str(disk.path / "run"))
    said = refused(config)
    assert "could not be written" in said and "No space left on device" in said
    directory = disk.path / "run"
    assert find_newest(directory / "checkpoints").step == 2
    assert "No space left" in refused(replace(config, resume=True))
    disk.change("size=64m")
    run(replace(config, resume=True))
    assert_same_run(whole, directory)


def test_a_directory_that_is_read_only_is_named_and_left_as_it_is(
    disk: Disk, config: TrainConfig, refused: Refused
):
    config = replace(config, output=str(disk.path / "run"))
    disk.change("ro")
    assert f"Read-only file system: '{disk.path}/run" in refused(config)
    disk.change("rw")
    run(replace(config, stop_after=2))
    before = metrics_of(disk.path / "run")
    disk.change("ro")
    said = refused(replace(config, resume=True))
    assert "Read-only file system" in said and f"{disk.path}/run" in said
    assert metrics_of(disk.path / "run") == before


def every_second(function: Callable[..., None]) -> Callable[..., None]:
    """The function, which fails at its second call, its fourth, and so on."""
    calls: list[None] = []

    def call(*args: object) -> None:
        calls.append(None)
        if len(calls) % 2 == 0:
            raise OSError(5, "Input/output error")
        function(*args)

    return call


def test_a_store_that_fails_every_second_write_only_costs_restarts(
    whole: Path,
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(checkpoint, "seal", every_second(checkpoint.seal))
    config = replace(config, output=str(tmp_path / "run"), save_every=1)
    failures = 0
    while True:
        try:
            run(replace(config, resume=failures > 0))
            break
        except OSError as error:
            assert "could not be written" in str(error) and "Input/output" in str(error)
            failures += 1
    assert failures == 3
    metrics = metrics_of(whole)
    assert metrics_of(tmp_path / "run") == metrics


def test_a_clock_that_is_set_back_changes_nothing(
    whole: Path, config: TrainConfig, tmp_path: Path
):
    halves = replace(config, output=str(tmp_path / "run"))
    with clock(-3600):
        run(replace(halves, stop_after=3))
        run(replace(halves, resume=True))
    assert_same_run(whole, tmp_path / "run")


def test_a_clock_that_jumps_ahead_while_a_checkpoint_is_written_only_costs_a_restart(
    whole: Path, config: TrainConfig, tmp_path: Path, refused: Refused
):
    halves = replace(config, output=str(tmp_path / "run"))
    said = refused(halves, 86_400)
    assert "could not be written" in said and "timed out" in said
    run(replace(halves, resume=True))
    assert_same_run(whole, tmp_path / "run")


def test_a_second_run_in_a_directory_is_refused(
    config: TrainConfig, tmp_path: Path, refused: Refused
):
    config = replace(config, output=str(tmp_path / "run"), stop_after=2)
    run(config)
    again = replace(config, resume=True)
    with open_directory(again):
        assert "Another run writes to" in refused(again)
    assert "already exists" in refused(config)
    run(again)  # what has ended keeps nobody out


def test_of_two_new_runs_at_one_time_the_second_to_begin_is_refused(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(config, output=str(tmp_path / "run"), stop_after=1)

    def first() -> None:
        with monkeypatch.context() as patch:
            patch.undo()
            run(config)

    rename = Path.rename

    def renamed_after_the_other(path: Path, target: Path) -> Path:
        monkeypatch.undo()
        first()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed_after_the_other)
    with pytest.raises(ValueError, match="run already exists; choose another --output"):
        run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["1"]
