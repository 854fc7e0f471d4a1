"""Several processes do what one does, each holding its part.

Two are started once, and read and write a model, use it, and begin a run; this process
goes on with that run, on its four devices. What takes more launches is slow.
"""

import json
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from many_processes import free_port, log_of, start, wait
from safetensors.numpy import load_file

from dpojax.cli import main
from dpojax.config import MeshConfig, TrainConfig
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.huggingface import write_model
from dpojax.run import run

SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
PROCESS = """
import sys
from pathlib import Path
import jax
import numpy as np
from dpojax.cli import main
from dpojax.config import DistributedConfig
from dpojax.connecting import connect
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.huggingface import read_params, read_settings, write_model
from dpojax.models.weight_files import StoredTensor
from dpojax.data.packing import Example
from dpojax.processes import check_same, decided_by_first
from dpojax.reference_cache import find_cache
from dpojax.reference_pass import make_reference_step, with_reference
from dpojax.sharding import as_shardings, make_mesh, make_placement

directory, port, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
settings = {"method": f"localhost:{port}", "num_processes": 2, "process": process}
connect(DistributedConfig(**settings))

def refuse():
    raise ValueError(f"process {process} decided")

for ask in (
    lambda: check_same({"batch_size": 4, "seed": process}, "give one"),
    lambda: decided_by_first(refuse),
):
    try:
        ask()
    except ValueError as error:
        print("refused:", error)
print("decided:", decided_by_first(lambda: f"by {process}"))
read, sizes = StoredTensor.read, []

def counted(tensor, index):
    values = read(tensor, index)
    sizes.append(values.nbytes)
    return values

StoredTensor.read = counted
settings = read_settings(directory / "model")
like = make_model(as_decoder_config(settings)).params
shardings = as_shardings(like, make_mesh(1, 4))
params = read_params(directory / "model", like, shardings)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
tokenizer = lambda path: (path / "tokenizer.json").write_text(str(process))
write_model(directory / "again", params, settings, tokenizer, max_shard_size=50_000)
written = sorted(path.name for path in (directory / "again").iterdir())

# Each has a cache of its own, and process 0 alone uses one.
model = make_model(as_decoder_config(settings))
mesh = make_mesh(1, 4)
rng = np.random.default_rng(0)
some = [rng.integers(1, 96, n).astype(np.int32) for n in range(3, 12)]
examples = [Example(some[0], (one, one[:2])) for one in some]
for _ in range(2):
    found = with_reference(
        examples,
        make_reference_step(model.apply, mesh),
        lambda: params,
        find_cache(directory / f"kept{process}", {}),
        batch_size=4,
        placement=make_placement(mesh),
    )
print("sums", sum(sum(one.reference) for one in found), flush=True)
print("read", sum(sizes) / size, len(written), flush=True)
main(sys.argv[4:])
"""


@pytest.fixture(scope="module")
def marred(place: Path, config: TrainConfig) -> TrainConfig:
    """The settings of a run that leaves out a bad record."""
    lines = Path(config.data[0]).read_text("utf-8").splitlines()
    data = place / "marred.jsonl"
    data.write_text("\n".join([*lines[:3], '{"prompt": 1}', *lines[3:]]), "utf-8")
    return replace(config, data=(str(data),), on_bad_record="skip")


@pytest.fixture(scope="module")
def begun(place: Path, marred: TrainConfig) -> tuple[Path, list[str]]:
    """The directory of a run that two processes of two devices began, and their logs.

    Before that they read and wrote ``model`` beside it as ``again``.
    """
    directory = place / "two"
    params = jax.jit(make_model(as_decoder_config(SETTINGS)).init)(jax.random.key(0))
    for name in ("model", "wanted"):
        write_model(
            directory / name,
            params,
            SETTINGS,
            lambda path: (path / "tokenizer.json").write_text("0"),
            max_shard_size=50_000,
        )
    flags = as_flags(marred, directory / "run", (2, 2, 1))
    port = str(free_port())
    command = ("-c", PROCESS, str(directory), port)
    commands = [(*command, str(n), *flags, "--stop-after", "2") for n in (0, 1)]
    codes = wait(start(directory, commands, num_devices=2))
    logs = [log_of(directory, number).read_text("utf-8") for number in (0, 1)]
    assert codes == [0, 0], logs
    return directory, logs


def as_flags(config: TrainConfig, output: Path, mesh: Sequence[int]) -> list[str]:
    """The flags of the module's run, those of its mesh too."""
    given = {
        "--model": config.model,
        "--data": config.data[0],
        "--output": output,
        "--test-size": config.test_size,
        "--on-bad-record": config.on_bad_record,
        "--max-length": config.max_length,
        "--batch-size": config.batch_size,
        "--steps": config.steps,
        "--log-every": config.log_every,
        "--evaluate-every": config.evaluate_every,
        "--save-every": config.save_every,
        "--sample-prompts": config.sample_prompts,
        "--sample-tokens": config.sample_tokens,
        "--optimizer.learning-rate": config.optimizer.learning_rate,
        "--mesh.data": mesh[0],
        "--mesh.fsdp": mesh[1],
        "--mesh.tensor": mesh[2],
    }
    return ["train", *(str(part) for pair in given.items() for part in pair)]


def test_two_processes_read_a_half_each_and_write_the_whole(
    begun: tuple[Path, list[str]],
):
    directory, said = begun
    files = {path.name: path.read_bytes() for path in (directory / "wanted").iterdir()}
    sums = [re.search(r"^sums (-\S+)$", text, re.MULTILINE) for text in said]
    for text in said:
        figures = re.search(r"^read (\S+) (\d+)$", text, re.MULTILINE)
        assert figures is not None, text
        assert 0.5 <= float(figures[1]) < 0.51  # norms are on every device
        assert int(figures[2]) == len(files)  # seen by both after writing
    assert len({found[1] for found in sums if found is not None}) == 1
    assert "9 examples reused, 0 to compute" in said[0]
    assert [path.name for path in directory.glob("kept*")] == ["kept0"]
    again = {path.name: path.read_bytes() for path in (directory / "again").iterdir()}
    assert again == files


def test_processes_that_differ_are_refused_and_process_0_decides_for_all(
    begun: tuple[Path, list[str]],
):
    for text in begun[1]:
        assert "refused: The seed of process 1 is another than that of process" in text
        assert "refused: process 0 decided" in text
        assert "decided: by 0" in text


def test_a_run_of_two_processes_is_that_of_one_which_may_continue_it(
    begun: tuple[Path, list[str]], marred: TrainConfig, place: Path
):
    directory, said = begun
    assert "Stopped after step 2 of 4" in said[0]
    assert "train step" not in said[1]  # one of them speaks for both
    whole = run(
        replace(marred, output=str(place / "whole"), mesh=MeshConfig(data=2, fsdp=2))
    )
    skipped = [each / "skipped.jsonl" for each in (directory / "run", whole.directory)]
    assert skipped[0].read_bytes() == skipped[1].read_bytes()
    parts = replace(marred, output=str(directory / "run"), mesh=MeshConfig(tensor=2))
    resumed = run(replace(parts, resume=True))
    assert_same_run(resumed.directory, whole.directory)


def assert_same_run(found: Path, wanted: Path) -> None:
    """The same examples at every step, and the same figures and weights to 1e-5."""
    rows, expected = (
        [
            json.loads(line)
            for line in (place / "metrics.jsonl").read_text("utf-8").splitlines()
        ]
        for place in (found, wanted)
    )
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if name in ("lengths/chosen", "lengths/rejected", "step", "split", "epoch"):
                assert row[name] == value, name
            elif name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
                assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    samples = [
        (place / "samples.jsonl").read_text("utf-8") for place in (found, wanted)
    ]
    assert samples[0] == samples[1]
    for line, other in zip(
        *(
            (place / "held_out.jsonl").read_text("utf-8").splitlines()
            for place in (found, wanted)
        ),
        strict=True,
    ):
        each, expected_each = json.loads(line), json.loads(other)
        assert each.keys() == expected_each.keys()
        for name, values in expected_each.items():
            np.testing.assert_allclose(each[name], values, rtol=1e-4, atol=1e-5)
    weights, others = (
        load_file(place / "final" / "model.safetensors") for place in (found, wanted)
    )
    for name, array in others.items():
        np.testing.assert_allclose(weights[name], array, atol=1e-5, err_msg=name)


def test_numbers_that_cannot_be_are_refused_before_anything_is_waited_for(
    config: TrainConfig, place: Path, capsys: pytest.CaptureFixture[str]
):
    flags = as_flags(config, place / "none", (1, 1, 1))
    for more, message in (
        (("host:1", "--num-processes", "2"), "needs --num-processes and --process"),
        (("host:1", "--num-processes", "2", "--process", "2"), "--process is 2 of"),
        (("host",), "give none, auto, mpi4py or HOST:PORT"),
        (("auto", "--process", "1"), "--distributed auto takes none"),
        (("none", "--num-processes", "2"), "--distributed none takes none"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*flags, "--distributed", *more])
        assert message in capsys.readouterr().err


# -- Launches of their own ------------------------------------------------------------


def train(
    directory: Path, flags: Sequence[str], count: int, more: Sequence[str] = ()
) -> list[list[str]]:
    """The commands of a run of so many processes, one device each."""
    address = f"localhost:{free_port()}"
    command = ("-m", "dpojax", *flags, *more)
    if count == 1:
        return [[*command]]
    together = ("--distributed", address, "--num-processes", str(count))
    return [[*command, *together, "--process", str(n)] for n in range(count)]


@pytest.mark.slow
def test_a_run_of_four_processes_goes_on_with_two_and_then_with_one(
    config: TrainConfig, place: Path
):
    longer = replace(config, steps=6)  # through the end of an epoch
    for count, mesh, more in (
        (4, (2, 2, 1), ("--stop-after", "2")),
        (2, (1, 1, 2), ("--stop-after", "4", "--resume")),
        (1, (1, 1, 1), ("--resume",)),
    ):
        flags = as_flags(longer, place / "fewer", mesh)
        assert set(wait(start(place, train(place, flags, count, more)))) == {0}
    alone = as_flags(longer, place / "alone", (1, 1, 1))
    assert wait(start(place, train(place, alone, 1))) == [0]
    assert_same_run(place / "fewer", place / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_takes_the_others_along_and_is_named(
    config: TrainConfig, place: Path, victim: int
):
    """What they saved is resumed bit for bit."""
    longer = replace(config, steps=16)
    output = place / f"killed-{victim}"
    flags = as_flags(longer, output, (1, 2, 1))
    started = start(place, train(place, flags, 2))
    saved = output / "checkpoints" / "4"
    while not saved.is_dir():
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[victim].send_signal(signal.SIGKILL)
    since = time.monotonic()
    codes = wait(started, 60)
    assert time.monotonic() - since < 60
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
    said = log_of(place, 1 - victim).read_text("utf-8")
    assert ("leader task" if victim == 0 else "Task 1 heartbeat timeout") in said
    assert not (output / "final").exists()
    assert wait(start(place, train(place, flags, 2, ("--resume",)))) == [0, 0]
    whole = as_flags(longer, place / f"whole-{victim}", (1, 2, 1))
    assert wait(start(place, train(place, whole, 2))) == [0, 0]
    weights, expected = (
        load_file(directory / "final" / "model.safetensors")
        for directory in (output, place / f"whole-{victim}")
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)


@pytest.mark.slow
def test_a_process_that_is_told_to_end_makes_all_save_and_stop(
    config: TrainConfig, place: Path
):
    longer = replace(config, steps=400, save_every=1000, evaluate_every=1000)
    output = place / "told"
    started = start(place, train(place, as_flags(longer, output, (1, 2, 1)), 2))
    metrics = output / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 3,' in metrics.read_text("utf-8")):
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    assert wait(started, 60) == [0, 0]
    (step,) = [int(path.name) for path in (output / "checkpoints").iterdir()]
    assert 3 < step < 400
    assert f"Stopped after step {step} of 400" in log_of(place, 0).read_text("utf-8")
