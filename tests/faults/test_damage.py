"""Checkpoints that are damaged, byte by byte and file by file: always known as such."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from kills import assert_same_run
from test_run import metrics_of

from dpojax.checkpoint import Checkpoints, Newest, find_newest
from dpojax.command_config import ExportConfig
from dpojax.config import TrainConfig
from dpojax.exporting import export
from dpojax.run import run

UNREAD = "commit_success.txt"  # Orbax writes it after the seal; nothing reads it


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two steps whose arrays differ in every element."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(path)
    for step in (1, 2):
        arrays = {"a": jax.random.normal(jax.random.key(step), (4096,))}
        checkpoints.save(step, arrays | {"step": jnp.array(step)}, {"seed": 0}, 0.5)
    checkpoints.close()
    return path


def flips(content: bytes) -> Iterator[bytes]:
    """The content with a bit changed in its first, middle and last kilobyte."""
    for start in (0, max(0, len(content) // 2 - 512), max(0, len(content) - 1024)):
        at = min(start + 512, start + (len(content) - start) // 2)
        yield content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def test_every_damage_to_every_file_is_known(intact: Path, tmp_path: Path):
    assert find_newest(intact) == Newest(2, {})
    copy = tmp_path / "checkpoints"
    shutil.copytree(intact, copy)
    files = [path for path in sorted((copy / "2").rglob("*")) if path.is_file()]
    files.remove(copy / "2" / UNREAD)
    assert len(files) > 10
    contents = {path: path.read_bytes() for path in files}
    for path, content in contents.items():
        others = (other for other in contents.values() if other != content)
        for damaged in (*flips(content), content[:-1], content + b"0", b"", *others):
            path.write_bytes(damaged)
            assert find_newest(copy).damaged.keys() == {2}, path
        path.unlink()
        assert find_newest(copy).damaged.keys() == {2}, path
        path.write_bytes(content)
    assert find_newest(copy) == Newest(2, {})


def test_checkpoints_that_have_changed_names_are_known(intact: Path, tmp_path: Path):
    copy = tmp_path / "checkpoints"
    shutil.copytree(intact, copy)
    (copy / "1").rename(copy / "3")
    assert find_newest(copy) == Newest(2, {3: "it was written as 1"})


def test_what_orbax_adds_after_the_seal_is_not_read(intact: Path, tmp_path: Path):
    copy = tmp_path / "checkpoints"
    shutil.copytree(intact, copy)
    (copy / "2" / UNREAD).unlink()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        "a": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=one),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=one),
    }
    checkpoints = Checkpoints(copy, read_only=True)
    found = checkpoints.restore(2, like)
    checkpoints.close()
    assert found["step"] == 2
    assert (found["a"] == jax.random.normal(jax.random.key(2), (4096,))).all()


@pytest.fixture(scope="module")
def whole(config: TrainConfig) -> TrainConfig:
    """The settings of a run that has ended, with checkpoints of steps 2 and 4."""
    run(config)
    return config


def damage(directory: Path, step: int) -> None:
    """Changes one byte of the largest file of a checkpoint."""
    files = (directory / "checkpoints" / str(step)).rglob("*")
    path = max(
        (path for path in files if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def copied(whole: TrainConfig, tmp_path: Path) -> Callable[[int], TrainConfig]:
    """Makes a copy of the run whose newest checkpoints, so many, are damaged."""

    def copy(num_damaged: int) -> TrainConfig:
        output = tmp_path / "copy"
        shutil.copytree(str(whole.output), output)
        for step in (4, 2)[:num_damaged]:
            damage(output, step)
        return replace(whole, output=str(output), resume=True)

    return copy


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    whole: TrainConfig,
    copied: Callable[[int], TrainConfig],
    capsys: pytest.CaptureFixture[str],
):
    config = copied(1)
    run(config)
    directory = Path(str(config.output))
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoints.damaged: step 4: state/" in said
    assert f"Resuming {directory} at step 2." in said
    assert (directory / "checkpoints.damaged" / "4.0").is_dir()
    assert_same_run(Path(str(whole.output)), directory)


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_as_it_is(
    copied: Callable[[int], TrainConfig],
):
    config = copied(2)
    directory = Path(str(config.output))
    before = metrics_of(directory)
    with pytest.raises(
        ValueError, match=r"No checkpoint .*\(step 4: .*; step 2: .*copy"
    ):
        run(config)
    assert metrics_of(directory) == before
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"2", "4"}


def test_an_export_passes_over_a_damaged_checkpoint_or_refuses_it(
    copied: Callable[[int], TrainConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    source = str(copied(1).output)
    export(ExportConfig(run=source, output=str(tmp_path / "exported")))
    said = " ".join(capsys.readouterr().out.split())
    assert "passed over: step 4: state/" in said and f"Step 2 of {source}" in said
    with pytest.raises(ValueError, match="step 4 .* is damaged: state/"):
        export(ExportConfig(run=source, output=str(tmp_path / "not"), step=4))
    assert not (tmp_path / "not").exists()
