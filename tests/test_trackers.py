"""What trackers are given: the lines of metrics.jsonl, each once, whatever happens.

TensorBoard's files are read back; W&B offline and trackio where they are installed.
"""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dpojax import trackers
from dpojax.advice import Adviser
from dpojax.config import TrainConfig
from dpojax.metrics_file import MetricsFile
from dpojax.recording import Recording
from dpojax.run import run
from dpojax.tracker_clients import Opening, Row
from dpojax.trackers import Trackers

Events = dict[str, dict[int, float]]  # values by name and step


def events_of(directory: Path) -> Events:
    """What event files hold; no value may stand in them twice."""
    event = import_module("tensorboardX.proto.event_pb2").Event
    found: Events = {}
    for path in (directory / "tensorboard").iterdir():
        for record in records(path.read_bytes()):
            read = event.FromString(record)
            for value in read.summary.value:
                if not value.HasField("simple_value"):
                    continue  # the configuration
                steps = found.setdefault(value.tag, {})
                assert read.step not in steps
                steps[read.step] = value.simple_value
    return found


def records(content: bytes) -> Iterator[bytes]:
    """Of a TFRecord file: length, its checksum, data, their checksum."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def lines_of(directory: Path) -> Events:
    """The same from metrics.jsonl."""
    found: Events = {}
    for step, split, values in MetricsFile(directory / "metrics.jsonl", 10**9).lines():
        for name, value in values.items():
            if value is not None:
                found.setdefault(f"{split}/{name}", {})[step] = value
    return found


def record(
    directory: Path, names: tuple[str, ...], steps: range, keep_until: int = -1
) -> None:
    """Lines of some steps, an evaluation after every second one."""
    adviser = Adviser(batch_size=4, is_logistic=True)
    with Trackers(names) as services:
        log = Recording(directory, keep_until, adviser, services, {"beta": 0.1})
        for step in steps:
            log.write(step, "train", {"loss": 1 / step, "grad_norm": float("nan")})
            if step % 2 == 0:
                log.write(step, "test", {"loss": 2 / step})
                log.keep()


@pytest.fixture(scope="module")
def resumed(config: TrainConfig, place: Path) -> Path:
    """A run that stopped half-way and went on."""
    tracked = replace(config, output=str(place / "tracked"), track=("tensorboard",))
    run(replace(tracked, stop_after=3))
    return run(replace(tracked, resume=True)).directory


def test_tensorboard_has_the_lines_of_a_resumed_run_once_each(resumed: Path):
    events, lines = events_of(resumed), lines_of(resumed)
    assert {name: list(steps) for name, steps in events.items()} == {
        name: list(steps) for name, steps in lines.items()
    }
    for name, steps in lines.items():
        assert events[name] == pytest.approx(steps, rel=1e-6)


def test_names_and_steps_are_those_that_users_of_trl_know(resumed: Path):
    events = events_of(resumed)
    sides = [f"{kind}/{side}" for kind in ("rewards", "logps")
             for side in ("chosen", "rejected")]  # fmt: skip
    both = ["loss", "rewards/margins", "rewards/accuracies", *sides]
    expected = [f"{split}/{name}" for split in ("train", "test") for name in both]
    expected += ["train/learning_rate", "train/grad_norm", "train/epoch"]
    assert set(expected) <= events.keys()
    assert list(events["train/loss"]) == [1, 2, 3, 4]
    assert list(events["test/loss"]) == [0, 2, 4]


def test_the_configuration_is_shown_without_where_it_ran(resumed: Path):
    (path,) = (resumed / "tensorboard").iterdir()
    content = path.read_bytes()
    assert b'"batch_size": 4' in content and b'"output": null' in content


def test_after_a_crash_no_line_is_lost_or_doubled(tmp_path: Path):
    """Steps 5 and 6 were written, and come again; the event file was cut short."""
    record(tmp_path, ("tensorboard",), range(1, 7))
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    record(tmp_path, ("tensorboard",), range(5, 9), keep_until=4)
    assert events_of(tmp_path) == {
        "train/loss": {step: pytest.approx(1 / step) for step in range(1, 9)},
        "test/loss": {step: pytest.approx(2 / step) for step in (2, 4, 6, 8)},
    }


def test_a_tracker_that_is_asked_for_later_gets_the_lines_from_before(tmp_path: Path):
    record(tmp_path, (), range(1, 5))
    assert not (tmp_path / "tensorboard").exists()
    record(tmp_path, ("tensorboard",), range(5, 7), keep_until=4)
    assert list(events_of(tmp_path)["train/loss"]) == [1, 2, 3, 4, 5, 6]


class Failing:
    """A service that fails at its second row."""

    failures = (OSError,)

    def __init__(self, opening: Opening):
        self.rows: list[tuple[int, Row]] = []

    def write(self, step: int, row: Row) -> None:
        if self.rows:
            raise OSError("the network is down")
        self.rows.append((step, row))

    def close(self, failed: bool) -> None:
        pytest.fail("It was told something after it had failed.")


def test_a_tracker_that_fails_is_named_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(trackers._PACKAGES, "wandb", "numpy")
    monkeypatch.setitem(trackers._CLIENTS, "wandb", Failing)
    record(tmp_path, ("wandb", "tensorboard"), range(1, 9))
    printed = capsys.readouterr().out
    assert printed.count("wandb failed") == 1 and "the network is down" in printed
    assert list(events_of(tmp_path)["train/loss"]) == list(range(1, 9))
    assert list(lines_of(tmp_path)["train/loss"]) == list(range(1, 9))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_told_before_anything_is_loaded(
    name: Any, config: TrainConfig, place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(trackers._PACKAGES, name, "no-such-package")
    monkeypatch.setattr("dpojax.run.load_material", lambda *_: pytest.fail("loaded"))
    config = replace(config, output=str(place / "never"), track=(name,))
    with pytest.raises(ValueError, match=rf"pip install 'dpojax\[{name}\]'"):
        run(config)
    assert not (place / "never").exists()


def test_other_processes_than_the_first_tell_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in ("processes", "recording"):
        monkeypatch.setattr(f"dpojax.{module}.is_first", lambda: False)
    record(tmp_path, ("tensorboard",), range(1, 5))
    assert list(tmp_path.iterdir()) == []


EXPECTED = [
    (step, {"train/loss": 1 / step} | ({} if step % 2 else {"test/loss": 2 / step}))
    for step in range(1, 9)
]


def test_wandb_has_one_row_a_step_and_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Offline each start has files of its own; the newest hold the whole run."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "w" * 40)
    record(tmp_path, ("wandb",), range(1, 7))
    record(tmp_path, ("wandb",), range(5, 9), keep_until=4)
    paths = sorted(tmp_path.glob("wandb/offline-*/run-*.wandb"))
    assert len(paths) == 2 and len({path.name for path in paths}) == 1
    assert rows_of_wandb(paths[1]) == EXPECTED
    written = b"".join(
        path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()
    )
    assert b"beta" in written and b"w" * 40 not in written


def rows_of_wandb(path: Path) -> list[tuple[int, dict[str, float]]]:
    """The rows of a file of W&B, whose own process writes it a little later."""
    read = read_wandb(path)
    for _ in range(100):
        if any(record.HasField("exit") for record in read):
            break
        time.sleep(0.1)
        read = read_wandb(path)
    rows = []
    for record in read:
        if record.HasField("history"):
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            values = {name: v for name, v in items.items() if not name.startswith("_")}
            rows.append((record.history.step.num, values))
    return rows


def read_wandb(path: Path) -> list[Any]:
    """After 7 bytes, each record: a header of 7 bytes, and data."""
    record_type = import_module("wandb.proto.wandb_internal_pb2").Record
    found, content = [], path.read_bytes()[7:]
    assert len(content) < 2**15  # where a record might be in two parts
    while content:
        (length,) = struct.unpack("<H", content[4:6])
        found.append(record_type.FromString(content[7 : 7 + length]))
        content = content[7 + length :]
    return found


def test_trackio_has_one_row_a_step_and_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at its import
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    record(tmp_path, ("trackio",), range(1, 7))
    record(tmp_path, ("trackio",), range(5, 9), keep_until=4)
    storage = import_module("trackio.sqlite_storage").SQLiteStorage
    name = f"{tmp_path.name}-{(tmp_path / 'tracked_as').read_text()}"
    rows = storage.get_logs("dpojax", name)
    assert [(row.pop("step"), row) for row in rows if row.pop("timestamp")] == EXPECTED
    assert storage.get_run_config("dpojax", name)["beta"] == 0.1
