"""Whole runs of a tiny model: what they leave, stopping and resuming, and their errors.

One short run is shared by the tests that only look at it.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpojax import __version__
from dpojax.checkpoint import Checkpoints
from dpojax.cli import _load_experiment
from dpojax.command_config import EvalConfig, ExportConfig, GenerateConfig, InitConfig
from dpojax.commands import evaluate_policy, init
from dpojax.config import LoraConfig, OptimizerConfig, TrainConfig
from dpojax.data.order import WINDOW
from dpojax.data.synthetic import (
    make_tokenizer,
)
from dpojax.data.tokenize import encode_prompt
from dpojax.evaluation import sample_metrics
from dpojax.exporting import export
from dpojax.reference_setting import why_not_equal
from dpojax.resume import check_note, make_note
from dpojax.run import Result, run
from dpojax.run_directory import write_samples
from dpojax.sampling import generate


@pytest.fixture(scope="module")
def whole(config: TrainConfig) -> Result:
    return run(config)


def metrics_of(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    of_the_machine = ("tokens_per_second", "memory_gib")
    return [
        {name: value for name, value in row.items() if name not in of_the_machine}
        for row in rows
    ]


def samples_of(directory: Path) -> list[dict]:
    text = (directory / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def held_out_of(directory: Path) -> str:
    return (directory / "held_out.jsonl").read_text(encoding="utf-8")


def test_a_run_leaves_what_its_documentation_says(whole: Result, config: TrainConfig):
    directory = whole.directory
    names = {"checkpoints", "config.py", "final", "lock", "metrics.jsonl", "model"}
    assert {path.name for path in directory.iterdir()} == names | {
        "held_out.jsonl",
        "samples.jsonl",
        "warnings.jsonl",
    }
    assert _load_experiment(directory / "config.py") == replace(config, output=None)
    rows = metrics_of(directory)
    assert [row["step"] for row in rows if row["split"] == "test"] == [0, 2, 4]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in samples_of(directory)] == [0, 0, 2, 2, 4, 4]


def test_the_first_evaluation_is_of_equal_policies(whole: Result):
    first = whole.first_evaluation
    assert first["rewards/accuracies"] == 0.5
    assert first["rewards/chosen"] == 0 == first["rewards/chosen_se"]
    assert whole.last_evaluation["loss"] != first["loss"]


def test_a_policy_that_is_not_its_reference_at_the_start_is_told_why(
    whole: Result, config: TrainConfig
):
    """The last evaluation stands for a first one that differs."""
    assert why_not_equal(config, whole.first_evaluation) is None
    values = whole.last_evaluation

    def reason(**changes: Any) -> str:
        told = why_not_equal(replace(config, **changes), values)
        assert told is not None and f"{values['logratios/chosen']:.3g} of" in told
        return told.partition(": ")[2]

    assert reason().startswith("no setting accounts for it")
    assert reason(reference=config.model).startswith("no setting accounts for it")
    assert reason(reference="other").startswith("the reference is other.")
    assert reason(reference="precomputed:other").startswith("the reference is other.")
    assert "in other rows" in reason(reference="precomputed")
    assert "DoRA" in reason(lora=LoraConfig(rank=2, kind="dora"))
    names = ("logratios/chosen", "logratios/rejected")
    zero = values | dict.fromkeys(names, 0.0)
    assert why_not_equal(config, zero) is not None  # they cancel, but have a spread
    errors = dict.fromkeys([f"{name}_se" for name in names], float("nan"))
    assert why_not_equal(config, zero | errors) is None  # of a single example
    assert why_not_equal(config, {"loss": 1.0}) is None  # there is no reference


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    whole: Result, config: TrainConfig, place: Path
):
    parts = replace(config, output=str(place / "parts"))
    stopped = run(replace(parts, stop_after=2))
    assert stopped.step == 2 and not (stopped.directory / "final").exists()
    resumed = run(replace(parts, resume=True))
    first = load_file(whole.directory / "final" / "model.safetensors")
    second = load_file(resumed.directory / "final" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
    assert metrics_of(whole.directory) == metrics_of(resumed.directory)
    assert samples_of(whole.directory) == samples_of(resumed.directory)
    assert held_out_of(whole.directory) == held_out_of(resumed.directory)
    texts = [
        (each.directory / "warnings.jsonl").read_bytes() for each in (whole, resumed)
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_another_process_repeats_a_run_bit_for_bit(whole: Result, place: Path):
    """By what the run left; sets of strings come in another order there."""
    again = place / "again"
    arguments = ["train", whole.directory / "config.py", "--output", again]
    subprocess.run(
        [sys.executable, "-m", "dpojax", *map(str, arguments)],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
    )
    first, second = (
        (path / "final" / "model.safetensors").read_bytes()
        for path in (whole.directory, again)
    )
    assert first == second
    assert metrics_of(whole.directory) == metrics_of(again)
    assert samples_of(whole.directory) == samples_of(again)


def test_each_evaluation_samples_and_tells_length_and_ends(whole: Result):
    tested = [row for row in metrics_of(whole.directory) if row["split"] == "test"]
    assert len(tested) == 3
    for row in tested:
        assert 1 <= row["samples/length"] <= 4  # sample_tokens
        assert 0 <= row["samples/eos_rate"] <= 1
    first = whole.first_evaluation
    assert first["samples/length"] == tested[0]["samples/length"]


def test_samples_are_as_far_from_the_reference_as_training_has_moved(whole: Result):
    tested = [row for row in metrics_of(whole.directory) if row["split"] == "test"]
    kl = [row["samples/kl"] for row in tested]
    assert kl[0] == 0
    assert kl[-1] > 0


def test_the_figures_of_held_out_examples_have_the_means_of_metrics(whole: Result):
    lines = [json.loads(line) for line in held_out_of(whole.directory).splitlines()]
    tested = [row for row in metrics_of(whole.directory) if row["split"] == "test"]
    assert [line["step"] for line in lines] == [row["step"] for row in tested]
    for line, row in zip(lines, tested, strict=True):
        for side in ("chosen", "rejected"):
            rewards, lengths = line[f"{side}_reward"], line[f"{side}_length"]
            assert np.mean(rewards) == pytest.approx(row[f"rewards/{side}"], abs=1e-5)
            assert np.mean(lengths) == pytest.approx(row[f"lengths/{side}"])


def test_by_hand_the_length_and_the_ends_of_samples():
    """Of 3, 1 and 2 tokens, two with an EOS: mean 2, variance 2/3, over 2: 1/3."""
    found = sample_metrics([[5, 6, 2], [2], [7, 8]], eos_token=2)
    assert found["samples/length"] == 2
    assert found["samples/length_se"] == pytest.approx((1 / 3) ** 0.5)
    assert found["samples/eos_rate"] == pytest.approx(2 / 3)


def test_samples_of_a_step_replace_those_of_it_and_of_later_ones(tmp_path: Path):
    tokenizer = make_tokenizer()
    prompt = encode_prompt("I read", tokenizer)

    def write(step: int) -> None:
        write_samples(tmp_path, step, [prompt], [prompt], tokenizer)

    for step in (0, 2, 4, 6):
        write(step)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 1')  # a crash
    write(4)
    assert [row["step"] for row in samples_of(tmp_path)] == [0, 2, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_what_decides_the_order_of_the_data_is_noted(config: TrainConfig):
    note = make_note(config, "", 16)
    assert note != make_note(replace(config, row_length=512), "", 16)
    assert note["window of examples"] == WINDOW


def test_a_note_of_an_earlier_version_is_refused_in_one_sentence(config: TrainConfig):
    note = make_note(config, "", 16)
    earlier = {key: value for key, value in note.items() if "window" not in key}
    with pytest.raises(ValueError, match="another window of examples: it was None"):
        check_note(earlier, note, Path("runs/old"))


def test_a_checkpoint_says_what_made_it(whole: Result, config: TrainConfig):
    note = Checkpoints(whole.directory / "checkpoints").note(4)
    settings = json.dumps(asdict(replace(config, output=None)))
    assert note["configuration"] == json.loads(settings)
    assert note["versions"]["jax"] == jax.__version__
    assert note["code"].startswith(f"dpojax {__version__}, ")
    assert note["devices"] == "4 of cpu (cpu) in 1 process(es)"
    assert len(note["data"]) == 64


def test_a_run_that_others_began_says_so_as_it_is_resumed(
    config: TrainConfig, capsys: pytest.CaptureFixture
):
    note = make_note(config, "", 16)
    check_note(note, note, Path("runs/old"))
    assert capsys.readouterr().out == ""
    older = note["versions"] | {"jax": "0.9"}
    check_note(note | {"versions": older}, note, Path("runs/old"))
    said = capsys.readouterr().out
    assert f"made by the same: jax was 0.9 and is {jax.__version__}; from" in said


def test_a_resumed_run_must_be_the_same_run(whole: Result, config: TrainConfig):
    other = replace(config, resume=True, seed=1)
    with pytest.raises(ValueError, match="cannot be resumed with another seed"):
        run(other)


def test_a_checkpoint_of_another_model_is_refused(
    whole: Result, config: TrainConfig, place: Path
):
    bigger = str(place / "bigger")
    tokenizer = str(place / "tokenizer")
    init(InitConfig(output=bigger, tokenizer=tokenizer, preset="small"))
    other = replace(config, resume=True, model=bigger)
    with pytest.raises(ValueError, match="another model"):
        run(other)


def test_the_export_of_the_last_checkpoint_is_the_final_model(
    whole: Result, place: Path
):
    output = str(place / "exported")
    export(ExportConfig(run=str(whole.directory), output=output, step=4))
    final = load_file(whole.directory / "final" / "model.safetensors")
    exported = load_file(Path(output) / "model.safetensors")
    assert final.keys() == exported.keys()
    for name, array in final.items():
        np.testing.assert_array_equal(array, exported[name])
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; it has 2, 4"):
        nowhere = str(place / "nowhere")
        export(ExportConfig(run=str(whole.directory), output=nowhere, step=3))


def test_generation_settings_go_from_the_model_to_the_run_and_its_export(
    whole: Result, place: Path
):
    output = export(ExportConfig(run=str(whole.directory), output=str(place / "sent")))
    for path in (whole.directory / "model", whole.directory / "final", output):
        settings = json.loads((path / "generation_config.json").read_text())
        assert settings == {"eos_token_id": [2, 5]}
        assert (path / "tokenizer.json").is_file()


def test_a_policy_evaluated_against_itself_has_no_kl(config: TrainConfig):
    assert config.model is not None and config.data is not None
    values = evaluate_policy(
        EvalConfig(
            model=config.model,
            reference=config.model,
            data=config.data,
            test_size=4,
            batch_size=4,
            kl_samples=4,
            sample_tokens=4,
        )
    )
    assert values["kl"] == 0 and values["rewards/accuracies"] == 0.5


def test_generation_continues_each_prompt(whole: Result):
    final = str(whole.directory / "final")
    prompts = ("On Saturday I read", "On Saturday I read a new novel")
    continued = generate(
        GenerateConfig(model=final, prompt=prompts, max_new_tokens=4, temperature=0.0)
    )
    assert [one.prompt for one in continued] == list(prompts)
    assert [len(one.completions) for one in continued] == [1, 1]


def test_a_number_that_is_none_stops_the_run_and_names_the_step(
    config: TrainConfig, place: Path
):
    wild = replace(
        config,
        output=str(place / "wild"),
        log_every=4,
        sample_prompts=0,
        optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=0),
    )
    with pytest.raises(FloatingPointError, match="of step 2 is nan") as error:
        run(wild)
    # Every norm overflows, and so does its derivative, for each row alone.
    assert re.search(
        r"the gradient after the last layer, not finite in norm/scale, which the "
        r"training examples \d+ \(from 0\) alone bring about",
        str(error.value),
    )
    assert (place / "wild" / "nan" / "step-2" / "report.json").is_file()
    assert not list((place / "wild" / "checkpoints").glob("[0-9]*"))
