"""What the command line says of input that it cannot use: one line, exit code 2.

Everything here fails before a step is taken. Whole runs are tested elsewhere.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpojax.cli import main

Fail = Callable[..., str]
COMMANDS = [
    "",
    "train",
    "eval",
    "score",
    "losses",
    "init",
    "generate",
    "export",
    "bench",
]
PAIRS = [
    {"prompt": f"I saw this {thing}", "chosen": " and it was good.", "rejected": "."}
    for thing in ("film", "movie", "comedy", "drama", "opera", "show")
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def fail(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Fail:
    """Runs a command that must fail; returns its error without the prefix."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpojax.sentiment.make_reviews", _not_refused)

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        assert stopped.value.code == 2
        assert "Traceback" not in printed.err + printed.out
        lines = [line for line in printed.err.splitlines() if "dpojax: error" in line]
        assert len(lines) == 1
        assert printed.err.endswith(lines[0] + "\n")
        assert lines[0].startswith("dpojax: error: ")
        return lines[0].removeprefix("dpojax: error: ")

    return run


def _not_refused(*_: object, **__: object) -> None:
    pytest.fail("The embedded task, which takes minutes, has started.")


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def changed(model: Path, directory: Path, file: str, **settings: Any) -> Path:
    """A copy of a model with other settings in one of its JSON files."""
    shutil.copytree(model, directory)
    path = directory / file
    content = json.loads(path.read_text(encoding="utf-8")) | settings
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")
    return directory


# -- Data --------------------------------------------------------------------------


def test_a_data_file_that_does_not_exist(fail: Fail, model: Path):
    message = fail("train", "--model", model, "--data", "none.jsonl")
    assert message == "There is no file or directory none.jsonl."


def test_a_line_that_is_not_json(fail: Fail, model: Path, data: Path):
    data.write_text(data.read_text() + '{"prompt": \n')
    message = fail("train", "--model", model, "--data", data)
    assert message.startswith(f"{data}, line 7 is not JSON: ")


def test_a_misspelt_column(fail: Fail, model: Path, data: Path):
    write_lines(data, [*PAIRS, {"prompt": "p", "choosen": "c", "rejected": "r"}])
    message = fail("train", "--model", model, "--data", data)
    assert message.startswith(f"{data}, line 7 has no 'chosen'; it has prompt, choosen")
    assert "is 'choosen' meant?" in message


def test_an_empty_completion(fail: Fail, model: Path, data: Path):
    write_lines(data, [*PAIRS, PAIRS[0] | {"rejected": ""}])
    message = fail("train", "--model", model, "--data", data)
    assert message.startswith(f"{data}, line 7: rejected is empty")


def test_pairs_that_are_all_identical(fail: Fail, model: Path, data: Path):
    write_lines(data, [row | {"rejected": row["chosen"]} for row in PAIRS])
    message = fail("train", "--model", model, "--data", data, "--test-size", 2)
    assert message.startswith("Of 4 records none is left")
    assert "4 have identical completions" in message


def test_too_few_examples_for_a_test_split(fail: Fail, model: Path, data: Path):
    message = fail("train", "--model", model, "--data", data, "--test-size", 0.01)
    assert message.startswith(f"{data} has no examples in its split 'test'; give")


def test_chats_without_a_chat_template(fail: Fail, model: Path, data: Path):
    chat = [{"role": "user", "content": "good"}]
    write_lines(data, [{"prompt": chat, "chosen": chat, "rejected": chat}])
    message = fail("train", "--model", model, "--data", data, "--test-size", 0)
    assert message.startswith(f"{data}, line 1: the tokenizer's chat template fails")


# -- Models ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "no-such-user/no-such-model", "./a/b/c"])
def test_a_model_that_is_neither_here_nor_on_the_hub(fail: Fail, data: Path, name: str):
    message = fail("train", "--model", name, "--data", data)
    assert message.startswith(f"There is no model directory '{name}'")


def test_a_directory_that_holds_no_model(fail: Fail, data: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    message = fail("train", "--model", "empty", "--data", data)
    assert message == "empty is not a model directory: it has no config.json."


def test_a_model_without_a_tokenizer(fail: Fail, model: Path, data: Path):
    directory = changed(model, data.parent / "model", "config.json")
    for path in directory.glob("tokenizer*"):
        path.unlink()
    message = fail("train", "--model", directory, "--data", data)
    assert message.startswith(f"No tokenizer can be read from {directory}: ")


def test_a_tokenizer_without_eos(fail: Fail, model: Path, data: Path):
    directory = data.parent / "model"
    changed(model, directory, "tokenizer_config.json", eos_token=None)
    message = fail("train", "--model", directory, "--data", data)
    assert message.startswith(f"The tokenizer {directory} names no EOS token")


def test_a_tokenizer_larger_than_the_embedding(fail: Fail, model: Path, data: Path):
    directory = changed(model, data.parent / "model", "config.json", vocab_size=128)
    message = fail("train", "--model", directory, "--data", data)
    assert re.match(r"The tokenizer has ids up to \d+, but the embedding of ", message)
    assert f"{directory} has only 128 rows" in message


def test_a_model_of_another_family(fail: Fail, model: Path, data: Path):
    directory = changed(model, data.parent / "model", "config.json", model_type="t5")
    message = fail("train", "--model", directory, "--data", data)
    assert "'t5'" in message and "llama" in message


def test_a_reference_of_another_shape(fail: Fail, model: Path, data: Path):
    settings = {"intermediate_size": 128, "max_position_embeddings": 99}
    other = changed(model, data.parent / "other", "config.json", **settings)
    arguments = "--model", model, "--data", data, "--reference", other
    message = fail("train", *arguments, "--test-size", 2)
    assert message == (
        f"The reference {other} is a model of another shape than the policy: "
        "mlp_width is 128 instead of 256."
    )


def test_weights_of_another_shape_than_the_settings(
    fail: Fail, model: Path, data: Path
):
    settings = {"intermediate_size": 128}
    directory = changed(model, data.parent / "model", "config.json", **settings)
    message = fail("train", "--model", directory, "--data", data)
    assert "mlp" in message and str(directory) in message


def test_weights_that_are_cut_short(fail: Fail, model: Path, data: Path):
    directory = changed(model, data.parent / "model", "config.json")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = fail("train", "--model", directory, "--data", data)
    assert message.startswith(f"{weights} cannot be read: ")


# -- Settings ----------------------------------------------------------------------


def train(model: Path, data: Path, *settings: object) -> tuple[object, ...]:
    return ("train", "--model", model, "--data", data, *settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["--loss", "simpoo"], "There is no loss 'simpoo'; did you mean 'simpo'?"),
        (
            ["--loss", "simpo", "--loss.tau", "1"],
            "The loss 'simpo' has no setting 'tau'",
        ),
        (["--loss", "dpo+kto"], "take pair and judged; only sft joins losses of pairs"),
        (["--loss", "none.py:mine"], "There is no loss file none.py"),
        (["--moving.every", "3"], "no effect on a reference that stays"),
        (["--moving", "bema", "--moving.alpha", "1"], "bema has no setting 'alpha'"),
        (["--moving", "tr_dpo", "--loss", "simpo"], "'simpo' uses no reference"),
        (["--loss", "odpo"], "is a pair without scores, which this loss needs"),
        (["--loss", "kto", "--batch-size", "1"], "batch_size must be at least 2"),
        (["--loss", "sft", "--beta", "0.1"], "The loss 'sft' has no setting 'beta'"),
        (["--loss", "sft", "--reference", "x"], "The loss 'sft' uses no reference"),
        (["--beta", "0"], "beta must be a positive number, not 0"),
        (["--loss.label-smoothing", "0.5"], "label_smoothing must be in [0, 0.5)"),
        (["--epochs", "1", "--steps", "3"], "--epochs or --steps, not both"),
        (["--batch-size", "0"], "batch_size is 0; it must be positive"),
        (["--steps", "-1"], "steps is -1; it must be positive"),
        (["--mesh.data", "3"], "does not fit 4 devices"),
        (["--max-length", "2"], "max_length is 2; it must be at least 4"),
        (["--test-size", "-1"], "test_size is -1"),
        (["--train-split", "validation"], "has no split 'validation'"),
        (["--resume"], "--resume needs the --output of a run"),
        (["--resume", "--output", "none"], "--resume needs the --output of a run"),
        (["--output", "."], "already exists; choose another --output"),
    ],
)
def test_a_setting_that_cannot_work_or_take_effect(
    fail: Fail, model: Path, data: Path, settings: list[str], expected: str
):
    assert expected in fail(*train(model, data, *settings))


def test_a_resumed_directory_must_hold_a_run(fail: Fail, model: Path, data: Path):
    (data.parent / "empty").mkdir()
    message = fail(*train(model, data, "--resume", "--output", "empty"))
    assert message.startswith("--resume needs the --output of a run")


@pytest.mark.parametrize(
    "settings",
    [["--test-size", "9"], ["--batch-size", "8"], ["--resume"], ["--steps", "3"]],
)
def test_settings_without_a_model_and_data_that_the_embedded_task_ignores(
    fail: Fail, settings: list[str]
):
    assert fail("train", *settings).startswith("Training needs --model and --data")


def test_a_model_without_data_and_data_without_a_model(
    fail: Fail, model: Path, data: Path
):
    assert "--data is missing" in fail("train", "--model", model)
    assert "--model is missing" in fail("train", "--data", data)


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["train", "--max-lenght", "3"], "--max-length"),
        (["train", "--optimizer.learning-rat", "3"], "--optimizer.learning-rate"),
        (["generate", "--model", "m", "--promt", "x"], "--prompt"),
        (["trian"], "train"),
    ],
)
def test_a_misspelt_flag_or_command_is_answered_with_the_nearest(
    capfd: pytest.CaptureFixture[str], arguments: list[str], nearest: str
):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert nearest in capfd.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_given_on_demand(capfd: pytest.CaptureFixture[str], command: str):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert "usage: dpojax" in capfd.readouterr().out


# -- Experiment files --------------------------------------------------------------


def test_an_experiment_file_that_does_not_exist(fail: Fail):
    message = fail("train", "experiments/none.py")
    assert message == "There is no experiment file experiments/none.py."


@pytest.mark.parametrize(
    "text",
    [
        "from dpojax.config import TrainConfig\n",
        "config = 3\n",
        "def config():\n    return None\n",
    ],
)
def test_an_experiment_file_without_a_config(fail: Fail, tmp_path: Path, text: str):
    (tmp_path / "experiment.py").write_text(text)
    assert fail("train", "experiment.py") == (
        "experiment.py has no function config() that returns a TrainConfig."
    )


def test_an_experiment_file_gives_the_defaults_and_flags_override_them(
    fail: Fail, model: Path, data: Path
):
    (data.parent / "experiment.py").write_text(
        "from dpojax.config import TrainConfig\n\n\n"
        f"def config():\n    return TrainConfig(model={str(model)!r}, "
        f"data=({str(data)!r},), batch_size=-7)\n"
    )
    assert "batch_size is -7" in fail("train", "experiment.py")
    assert "batch_size is -9" in fail("train", "experiment.py", "--batch-size", "-9")


# -- The other commands ------------------------------------------------------------


def test_init_refuses_a_directory_that_holds_something(fail: Fail, model: Path):
    message = fail("init", "--output", model, "--tokenizer", model)
    assert message == f"{model} already exists; choose another --output."


def test_init_refuses_a_tokenizer_that_is_not_there(fail: Fail, model: Path):
    arguments = "init", "--output", "new", "--tokenizer"
    assert fail(*arguments, "none").startswith("No tokenizer can be read from none: ")
    message = fail(*arguments, model, "--eos-token", "<end>")
    assert message == f"The tokenizer {model} has no token '<end>'."


def test_eval_refuses_what_train_refuses(fail: Fail, model: Path, data: Path):
    arguments = "eval", "--model", model, "--reference", model, "--data"
    assert fail(*arguments, "none.jsonl").startswith("There is no file or directory")
    assert "batch_size is 0" in fail(*arguments, data, "--batch-size", "0")
    assert "beta must be" in fail(*arguments, data, "--beta", "-1")


def test_export_refuses_what_is_not_a_run(fail: Fail, model: Path):
    message = fail("export", "none", "--output", "new")
    assert message == "none is not the directory of a run of dpojax train."


def test_generate_refuses_a_model_that_is_not_there(fail: Fail):
    message = fail("generate", "--model", "none", "--prompt", "I saw")
    assert message.startswith("There is no model directory 'none'")
