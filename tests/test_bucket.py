"""Checkpoints in a bucket, which a server on this machine plays."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import NAME, Bucket, bucket
from many_processes import free_port, log_of, start, wait
from test_run import metrics_of

from dpojax.checkpoint import (
    Checkpoints,
    Newest,
    find_newest,
    read_files,
    set_aside,
    steps_in,
)
from dpojax.command_config import ExportConfig
from dpojax.config import TrainConfig
from dpojax.exporting import export
from dpojax.object_store import Store, as_place
from dpojax.run import run

COMMAND = """
import os, sys
from dpojax.cli import main

os.makedirs(sys.argv[1], exist_ok=True)
os.chdir(sys.argv[1])
main(sys.argv[2:])
"""
KEPT = ("config.py", "samples.jsonl", "held_out.jsonl", "warnings.jsonl")


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with bucket() as served:
        yield served


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs tries again without a wait, which hundreds of requests would make long."""
    from gcsfs import retry

    async def sleep(seconds: float) -> None:
        pass

    monkeypatch.setattr(retry, "asyncio", SimpleNamespace(sleep=sleep))


def save(place: str, *steps: int) -> None:
    checkpoints = Checkpoints(place)
    for step in steps:
        arrays = {"a": jnp.arange(4096.0) + step}
        checkpoints.save(step, arrays, {"seed": step}, 0.5, {"metrics.jsonl": "é\n"})
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(server: Bucket) -> str:
    """Checkpoints of two steps."""
    save(f"{NAME}/runs/a", 1, 2)
    return f"{NAME}/runs/a"


def copied(place: str, name: str) -> str:
    store, copy = Store(place), Store(f"{NAME}/{name}")
    for file in store.files():
        copy.write(file, store.read(file))
    return copy.place


def test_what_was_saved_comes_back(saved: str):
    assert find_newest(saved) == Newest(2, {})
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"a": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=one)}
    checkpoints = Checkpoints(saved, read_only=True)
    np.testing.assert_array_equal(
        checkpoints.restore(2, like)["a"], np.arange(4096) + 2
    )
    assert checkpoints.note(1) == {"seed": 1}
    checkpoints.close()
    assert read_files(saved, 2) == {"metrics.jsonl": "é\n"}


def test_a_damaged_object_is_named_and_its_checkpoint_set_aside(saved: str):
    copy = copied(saved, "damaged")
    store = Store(copy)
    data = max(
        (size.size, name) for name, size in store.files().items() if "2/" in name
    )
    content = bytearray(store.read(data[1]))
    content[len(content) // 2] ^= 1
    store.write(data[1], bytes(content))
    name = data[1].removeprefix("2/")
    assert find_newest(copy) == Newest(1, {2: f"{name} is not what was written"})
    aside = set_aside(copy, [2])
    assert aside == f"{copy}.damaged"
    assert Store(f"{aside}/2.0").read(name) == content
    assert find_newest(copy) == Newest(1, {})
    store.write("2/commit_success.txt", b"")  # as if the last removal had been cut off
    assert find_newest(copy) == Newest(1, {2: "it has no md5.json"})
    assert Store(set_aside(copy, [2])).names() == ["2.0", "2.1"]


def test_without_its_marker_a_checkpoint_is_none_and_is_cleared_away(saved: str):
    copy = copied(saved, "unmarked")
    shown = Store(copy).files()
    Store(f"{copy}/2").move("commit_success.txt", Store(f"{copy}/other"), "moved")
    assert find_newest(copy) == Newest(1, {})
    save(copy, 2)
    assert find_newest(copy) == Newest(2, {})
    assert len(Store(f"{copy}/2").files()) == sum("2/" in name for name in shown)


def test_of_two_new_runs_one_gets_the_place(server: Bucket, tmp_path: Path):
    for store in (Store(f"{NAME}/claimed"), Store(tmp_path / "claimed")):
        store.create("config.py", b"first")
        with pytest.raises(FileExistsError):
            store.create("config.py", b"second")
        assert store.read("config.py") == b"first"


def test_a_bucket_that_refuses_is_named_in_a_sentence(saved: str, server: Bucket):
    server.is_forbidden = True
    try:
        with pytest.raises(OSError, match="Forbidden"):
            find_newest(saved)
    finally:
        server.is_forbidden = False


def test_a_bucket_that_is_not_reached_is_named_in_a_sentence(
    server: Bucket,
    at_once: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    store = Store(f"{NAME}/runs/a")
    monkeypatch.setattr(type(store._files), "_location", "http://localhost:9")
    with pytest.raises(
        OSError, match="gs://bucket/runs/a could not be reached: Cannot"
    ):
        store.names()
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("s3://bucket/path", "give a directory or gs://bucket/path"),
        ("", "give a directory or gs://bucket/path"),
        ("gs://bucket", "give gs://bucket/path"),
        ("gs://bucket/../other", "give gs://bucket/path"),
        ("gs://bucket/what?", "give gs://bucket/path"),
    ],
)
def test_other_places_are_refused(given: str, message: str):
    with pytest.raises(ValueError, match=message):
        as_place(given)


def test_without_its_client_a_bucket_is_refused_naming_the_extra(
    monkeypatch: pytest.MonkeyPatch,
):
    from importlib.metadata import PackageNotFoundError

    from dpojax import object_store

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(object_store, "version", missing)
    with pytest.raises(ValueError, match=r"pip install 'dpojax\[gcs\]'"):
        as_place("gs://bucket/path")


@pytest.fixture(scope="module")
def whole(config: TrainConfig) -> Path:
    """A run that nothing disturbs, its checkpoints in its directory."""
    return run(config).directory


def assert_same(one: Path, other: Path) -> None:
    weights = "final/model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    assert metrics_of(one) == metrics_of(other)
    for name in KEPT:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_without_its_directory_a_run_goes_on_from_its_bucket(
    server: Bucket, whole: Path, config: TrainConfig, tmp_path: Path
):
    place, output = f"{NAME}/runs/moved", tmp_path / "run"
    halves = replace(config, output=str(output), checkpoints=place)
    run(replace(halves, stop_after=2))
    lines = (output / "metrics.jsonl").read_bytes()
    assert not (output / "checkpoints").exists()
    again = replace(halves, output=str(tmp_path / "again"))
    with pytest.raises(ValueError, match="already holds a run's checkpoints"):
        run(again)
    with pytest.raises(ValueError, match=f"are in {place}; resume it with the same"):
        run(replace(halves, resume=True, checkpoints=None))
    shutil.rmtree(output)
    result = run(replace(halves, resume=True))
    assert result.step == 4
    assert (output / "metrics.jsonl").read_bytes().startswith(lines)
    assert_same(whole, output)
    hf = export(ExportConfig(run=str(output), step=2, output=str(tmp_path / "hf")))
    assert (hf / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="or where there is none its --checkpoints"):
        run(replace(again, resume=True, checkpoints=f"{NAME}/runs/none"))


@pytest.mark.slow
def test_a_bucket_that_refuses_every_request_at_first_changes_nothing(
    server: Bucket, at_once: None, whole: Path, config: TrainConfig, tmp_path: Path
):
    output = str(tmp_path / "run")
    server.is_flaky = True
    try:
        run(replace(config, output=output, checkpoints=f"{NAME}/runs/flaky"))
    finally:
        server.is_flaky = False
    assert_same(whole, tmp_path / "run")
    assert find_newest(f"{NAME}/runs/flaky") == Newest(4, {})


def test_a_bucket_that_fails_for_good_stops_a_run_which_goes_on_when_it_is_mended(
    server: Bucket, whole: Path, config: TrainConfig, tmp_path: Path
):
    place, output = f"{NAME}/runs/failing", tmp_path / "run"
    settings = replace(config, output=str(output), checkpoints=place)
    server.last = "failing/2/commit_success.txt"
    try:
        with pytest.raises(
            OSError, match=f"to {place} .Forbidden: .*; those before it"
        ):
            run(settings)
    finally:
        server.last, server.is_forbidden = "nothing", False
    assert find_newest(place) == Newest(2, {})
    run(replace(settings, resume=True))
    assert_same(whole, output)


@pytest.mark.faults
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_is_killed_and_loses_its_disks_goes_on_from_its_bucket(
    server: Bucket, config: TrainConfig, tmp_path: Path, num_processes: int
):
    place = f"{NAME}/killed/{num_processes}"
    experiment = tmp_path / "experiment.py"
    names = "DistributedConfig, LoraConfig, LossConfig, MeshConfig, MovingConfig"
    settings = replace(config, output="run", steps=12, save_every=1)
    experiment.write_text(
        f"from dpojax.config import {names}, OptimizerConfig, TrainConfig\n\n\n"
        f"def config():\n    return {settings!r}\n"
    )

    def begin(name: str, *more: str) -> list[subprocess.Popen[bytes]]:
        """One that has a directory of its own for each process."""
        flags = ["train", str(experiment), "--checkpoints", f"{place}/{name}", *more]
        commands = [
            ("-c", COMMAND, str(tmp_path / f"{name}{number}"), *flags)
            for number in range(num_processes)
        ]
        if num_processes > 1:
            address = f"localhost:{free_port()}"
            together = "--distributed", address, "--num-processes", str(num_processes)
            commands = [
                (*command, *together, "--process", str(number))
                for number, command in enumerate(commands)
            ]
        return start(tmp_path, commands)

    def said() -> list[str]:
        return [log_of(tmp_path, i).read_text("utf-8") for i in range(num_processes)]

    done = [0] * num_processes
    assert wait(begin("whole")) == done, said()
    processes = begin("killed")
    while max(steps_in(f"{place}/killed"), default=0) < 4:
        assert all(process.poll() is None for process in processes), said()
        time.sleep(0.05)
    for process in processes:
        process.kill()
    wait(processes)
    shutil.rmtree(tmp_path / "killed0")
    assert not (tmp_path / "killed1" / "run").exists()
    assert wait(begin("killed", "--resume")) == done, said()
    assert_same(tmp_path / "whole0" / "run", tmp_path / "killed0" / "run")
