"""Whole runs that train adapters: what they leave, resume, merge and refuse."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpojax.command_config import EvalConfig, ExportConfig, GenerateConfig, InitConfig
from dpojax.commands import evaluate_policy, init
from dpojax.config import (
    LoraConfig,
    LossConfig,
    MovingConfig,
    OptimizerConfig,
    TrainConfig,
)
from dpojax.exporting import export
from dpojax.run import Result, run
from dpojax.sampling import generate


@pytest.fixture(scope="module")
def config(config: TrainConfig) -> TrainConfig:
    lora, optimizer = LoraConfig(rank=4, alpha=8.0), OptimizerConfig(learning_rate=1e-2)
    return replace(config, lora=lora, optimizer=optimizer)


@pytest.fixture(scope="module")
def whole(config: TrainConfig) -> Result:
    return run(config)


def evaluated(model: Path, reference: Path, place: Path) -> dict[str, float]:
    return evaluate_policy(
        EvalConfig(
            model=str(model),
            reference=str(reference),
            data=(str(place / "pairs.jsonl"),),
            test_size=4,
            max_length=96,
            kl_samples=2,
            sample_tokens=4,
        )
    )


def test_what_a_run_leaves_are_adapters_that_are_evaluated_as_in_the_run(
    whole: Result, place: Path
):
    final = whole.directory / "final"
    assert not (final / "model.safetensors").exists()
    settings = json.loads((final / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(place / "model")
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    first, last = whole.first_evaluation, whole.last_evaluation
    assert abs(first["loss"] - np.log(2)) < 1e-7 and first["rewards/chosen"] == 0
    assert abs(last["loss"] - first["loss"]) > 1e-3  # of other pairs than those trained
    values = evaluated(final, place / "model", place)
    for name in ("loss", "rewards/margins", "logps/chosen"):
        np.testing.assert_allclose(values[name], last[name], rtol=1e-5, atol=1e-6)
    itself = evaluated(final, final, place)
    assert abs(itself["loss"] - np.log(2)) < 1e-7 and itself["kl"] == 0


def test_the_merged_model_is_evaluated_as_the_adapters_are(whole: Result, place: Path):
    merged, again = place / "merged", place / "merged-adapters"
    run_directory = str(whole.directory)
    export(ExportConfig(run=run_directory, output=str(merged), merge=True))
    final = str(whole.directory / "final")
    export(ExportConfig(run=final, output=str(again), merge=True))
    one, two = (load_file(path / "model.safetensors") for path in (merged, again))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    base = load_file(place / "model" / "model.safetensors")
    assert base.keys() == one.keys()
    values = evaluated(merged, place / "model", place)
    wanted = whole.last_evaluation
    for name in ("loss", "rewards/margins", "logps/chosen"):
        np.testing.assert_allclose(values[name], wanted[name], rtol=1e-5, atol=1e-5)
    prompts = ("I saw this film because",)
    texts = [
        generate(GenerateConfig(model=name, prompt=prompts, temperature=0.0))
        for name in (str(merged), final)
    ]
    assert texts[0] == texts[1]


def test_the_export_of_the_last_checkpoint_is_the_final_adapters(
    whole: Result, place: Path
):
    output = place / "exported"
    export(ExportConfig(run=str(whole.directory), output=str(output)))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        final = whole.directory / "final" / name
        assert (output / name).read_bytes() == final.read_bytes()


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    whole: Result, config: TrainConfig, place: Path
):
    halves = replace(config, output=str(place / "halves"))
    run(replace(halves, stop_after=2))
    resumed = run(replace(halves, resume=True))
    name = "final/adapter_model.safetensors"
    one, two = (load_file(path / name) for path in (whole.directory, resumed.directory))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    with pytest.raises(ValueError, match="another LoRA"):
        run(replace(halves, resume=True, lora=LoraConfig(rank=4, alpha=9.0)))


@pytest.mark.parametrize("from_base", [False, True])
def test_adapters_are_trained_further_with_the_first_or_the_base_as_reference(
    from_base: bool, whole: Result, config: TrainConfig, place: Path
):
    first = str(whole.directory / "final")
    further = replace(
        config,
        model=first,
        reference=str(place / "model") if from_base else None,
        output=str(place / f"further-{from_base}"),
        lora=LoraConfig(),
        steps=2,
    )
    result = run(further)
    start = result.first_evaluation
    if from_base:
        np.testing.assert_allclose(start["loss"], whole.last_evaluation["loss"], 1e-5)
    else:
        assert abs(start["loss"] - np.log(2)) < 1e-7
    settings = result.directory / "final" / "adapter_config.json"
    assert json.loads(settings.read_text())["base_model_name_or_path"] == config.model
    values = evaluated(
        result.directory / "final", place / "model" if from_base else Path(first), place
    )
    np.testing.assert_allclose(values["loss"], result.last_evaluation["loss"], 1e-5)


@pytest.mark.parametrize(("base", "layers"), [("bfloat16", None), ("nf4", 1)])
def test_a_smaller_base_is_trained_on_and_gives_adapters(
    base: Any, layers: int | None, config: TrainConfig, place: Path
):
    how: dict[str, Any] = {"dropout": 0.1, "kind": "dora", "layers": layers}
    lora = LoraConfig(rank=4, alpha=8.0, base=base, **how)
    output = str(place / f"small-{base}")
    # Every step sees the same twelve pairs, so that the loss must fall.
    few = replace(config, lora=lora, output=output, max_examples=16)
    result = run(replace(few, steps=3, batch_size=12))
    assert abs(result.first_evaluation["loss"] - np.log(2)) < 1e-4
    rows = (result.directory / "metrics.jsonl").read_text().splitlines()
    trained = [row for row in map(json.loads, rows) if row["split"] == "train"]
    assert trained[-1]["loss"] < trained[0]["loss"] - 5e-4
    tensors = load_file(result.directory / "final" / "adapter_model.safetensors")
    assert {str(values.dtype) for values in tensors.values()} == {"float32"}
    assert any(".layers.0." in name for name in tensors) == (layers is None)
    export(ExportConfig(run=output, output=output + "-merged", merge=True))


def test_a_reward_model_is_trained_as_adapters_and_a_head(
    config: TrainConfig, place: Path
):
    loss, output = LossConfig(name="bradley_terry"), str(place / "reward")
    result = run(replace(config, loss=loss, output=output, steps=2))
    final = result.directory / "final"
    tensors = load_file(final / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in tensors
    values = evaluate_policy(
        EvalConfig(
            model=str(final),
            data=config.data,
            test_size=4,
            max_length=96,
            loss=loss,
        )
    )
    np.testing.assert_allclose(values["loss"], result.last_evaluation["loss"], 1e-5)
    merged = place / "reward-merged"
    export(ExportConfig(run=output, output=str(merged), merge=True))
    np.testing.assert_array_equal(
        load_file(merged / "model.safetensors")["score.weight"],
        tensors["base_model.model.score.weight"],
    )
    with pytest.raises(ValueError, match="is a reward model"):
        generate(GenerateConfig(model=str(final), prompt=("I",)))


def test_settings_that_cannot_take_effect_are_refused(
    whole: Result, config: TrainConfig, place: Path
):
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            run(replace(config, output=str(place / "nowhere"), **changes))

    final = str(whole.directory / "final")
    refused("lora.alpha describes new adapters", lora=LoraConfig(alpha=4.0))
    refused("lora.layers describes new adapters", lora=LoraConfig(layers=0))
    refused("lora.layers is 9; of a model of 2", lora=LoraConfig(rank=2, layers=9))
    refused("no effect without adapters", lora=LoraConfig(base="nf4"))
    refused("no effect without adapters", lora=LoraConfig(dropout=0.1))
    refused("must be in .0, 1.", lora=LoraConfig(rank=2, dropout=1.0))
    refused("must be positive", lora=LoraConfig(rank=0))
    refused("matches no projection", lora=LoraConfig(rank=2, targets=("lm_head",)))
    refused("holds adapters already", model=final)
    refused("another shape than the policy's", reference=final, lora=LoraConfig(rank=2))
    refused("needs all weights to be trained", moving=MovingConfig(kind="tr_dpo"))
    init(
        InitConfig(
            output=str(place / "other"),
            tokenizer=str(place / "tokenizer"),
            preset="tiny",
            seed=1,
        )
    )
    refused("adapters of it; .*other is another model", reference=str(place / "other"))
    assert not (place / "nowhere").exists()
    refuse = pytest.raises(ValueError, match="all that|what can be exported|--merge")
    with refuse:
        export(ExportConfig(run=final, output=str(place / "nowhere")))
    full = run(
        replace(config, lora=LoraConfig(), output=str(place / "full"), steps=1)
    ).directory
    with pytest.raises(ValueError, match="trained all weights"):
        export(ExportConfig(run=str(full), output=str(place / "no"), merge=True))
    with pytest.raises(ValueError, match="whole model by dpojax export --merge"):
        evaluated(full / "final", Path(final), place)
    assert not (place / "nowhere").exists()
