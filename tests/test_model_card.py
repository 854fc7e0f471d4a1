"""The card beside a model: what the hub reads of it, and that no text breaks it."""

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from dpojax.cli import parse
from dpojax.command_config import ExportConfig
from dpojax.command_line import as_command, without_places
from dpojax.config import LoraConfig, LossConfig, MovingConfig, TrainConfig
from dpojax.exporting import export
from dpojax.losses.table import MIXTURES, OBJECTIVES
from dpojax.model_card import definition, facts, make_card
from dpojax.provenance import made_by
from dpojax.run import Result, run
from dpojax.user_code import load_names

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.py"))
EVIL = "a`b``c\n---\n# d: {e} <script> | [f](g) 'h' \"i\" ../j"


def card_of(config: TrainConfig, base: str = "org/model", **changes: Any) -> str:
    """The card of a run that was never made."""
    about = facts(
        config, base, num_examples={"training": 1_000}, rates=np.array([1e-6])
    )
    evaluation = {"loss": 0.5, "loss_se": 0.01, "rewards/chosen": float("nan")}
    evaluation |= {f"loss/{config.loss.name}": 0.25}
    note = {"facts": about, "evaluation": evaluation, "evaluated_at": 30}
    kinds = {"is_adapter": False, "is_reward": False} | changes
    return make_card(made_by(config) | note, 40, **kinds)


def front_of(text: str) -> dict[str, Any]:
    """The front matter, as the hub's own code reads it."""
    return ModelCard(text).data.to_dict()


@pytest.fixture(scope="module")
def adapted(config: TrainConfig, place: Path) -> Result:
    """A run of two steps that trains adapters."""
    output = str(place / "adapted")
    return run(replace(config, output=output, steps=2, lora=LoraConfig(rank=2)))


def test_what_a_run_leaves_says_what_it_is(adapted: Result, place: Path):
    text = (adapted.directory / "final" / "README.md").read_text("utf-8")
    assert front_of(text) == {  # neither a licence nor names of what is not the hub's
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["dpojax", "jax", "dpo"],
    }
    assert str(place) not in text and "/tmp" not in text
    for part in (
        "16 training, 4 held out",
        "`-(1-e) ls(h) - e ls(-h)`; beta 0.1, label_smoothing 0.0",
        "## Results after step 2",
        "Step 2, 4 examples each",
        "learning rate 0.001 at most, linear",
        "@misc{rafailov2023,",
        "eprint = {2305.18290}",
        "--lora.rank 2",
        "- jax ",
    ):
        assert part in text, part


def test_every_metric_of_a_run_is_defined(adapted: Result):
    names = {name for name in adapted.last_evaluation if not name.endswith("_se")}
    assert "rewards/accuracies" in names and "samples/kl" in names
    assert [name for name in names if not definition(name)] == []


def test_an_export_has_the_card_of_its_step(adapted: Result, place: Path):
    run_directory = str(adapted.directory)
    written = [
        export(ExportConfig(run=run_directory, output=str(place / name), merge=merge))
        for name, merge in (("exported", False), ("merged", True))
    ]
    texts = [(path / "README.md").read_text("utf-8") for path in written]
    assert texts[0] == (adapted.directory / "final/README.md").read_text("utf-8")
    assert front_of(texts[1])["library_name"] == "transformers"
    both = export(
        ExportConfig(
            run=str(adapted.directory / "final"), output=str(place / "m"), merge=True
        )
    )
    text = (both / "README.md").read_text("utf-8")
    assert front_of(text)["tags"] == ["dpojax"] and str(place) not in text


def test_names_of_the_hub_are_given_to_it_and_paths_are_not(tmp_path: Path):
    local = tmp_path / "pairs.jsonl"
    local.touch()
    data = ("org/pairs", str(local))
    config = TrainConfig(model="org/adapters", data=data)
    text = card_of(config, "org/model")
    front = front_of(text)
    assert (front["base_model"], front["datasets"]) == ("org/model", ["org/pairs"])
    assert "`pairs.jsonl`" in text and str(tmp_path) not in text


def test_a_reward_model_is_a_classifier():
    config = TrainConfig(loss=LossConfig(name="bradley_terry"), data=("org/pairs",))
    text = card_of(config, is_reward=True)
    assert front_of(text)["pipeline_tag"] == "text-classification"
    assert "# A reward model" in text and "{2203.02155}" in text


def test_no_name_breaks_the_yaml_or_the_text():
    """A name of three lines with Markdown, HTML and YAML in it stays one name."""
    config = TrainConfig(model=EVIL, data=(EVIL,), reference=EVIL)
    card = ModelCard(card_of(config, EVIL))
    front = front_of(card.content)
    assert (front["base_model"], front["datasets"]) == (EVIL, [EVIL])
    outside, fenced = [], False
    for line in card.text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            outside.append(line)
    headings = [line for line in outside if line.startswith("#")]
    assert len(headings) == 6 and not any("d:" in line for line in headings)
    named = [line for line in outside if "<script>" in line]
    assert len(named) == 3 and all(line.startswith("- ") for line in named)
    assert all(line.count("```") == 2 for line in named)


@pytest.mark.parametrize("name", [*OBJECTIVES, *MIXTURES, "0.5*dpo+0.5*sft"])
def test_every_objective_has_a_card(name: str):
    text = card_of(TrainConfig(loss=LossConfig(name=name), data=("org/pairs",)))
    front = yaml.safe_load(text.split("---")[1])
    assert "dpojax" in front["tags"]
    assert "## Objective" in text


def test_a_loss_of_the_user_s_own_is_named_and_not_run(tmp_path: Path):
    path = f"{tmp_path}/mine.py:loss"
    text = card_of(TrainConfig(loss=LossConfig(name=path, beta=0.3)))
    assert "`mine.py:loss`" in text and "beta 0.3" in text
    assert str(tmp_path) not in text and "## Citation" not in text
    assert "| `loss/mine.py:loss` | 0.25 |" in text


def test_paths_lose_their_directories():
    settings = {
        "model": "/home/me/sft", "reference": "precomputed:/home/me/sft",
        "data": ("~/pairs.jsonl", "org/pairs", "runs/a.jsonl"),
        "loss": {"name": "0.5*/home/me/l.py:f+sft"}, "steps": 3,
    }  # fmt: skip
    assert without_places(settings) == {
        "model": "sft",
        "reference": "precomputed:sft",
        "data": ["pairs.jsonl", "org/pairs", "runs/a.jsonl"],
        "loss": {"name": "0.5*l.py:f+sft"},
        "steps": 3,
    }


def examples() -> list[TrainConfig]:
    own = [load_names(path, "experiment")["config"]() for path in EXPERIMENTS]
    return [
        *own,
        TrainConfig(),
        TrainConfig(
            model="a b",
            data=("x", "y"),
            columns={"prompt": "question", "chosen": "answer"},
            fit=True,
            loss=LossConfig(name="ipo", average=False),
            moving=MovingConfig(kind="tr_dpo", every=3),
            track=("tensorboard", "wandb"),
            offload=("optimizer",),
        ),
    ]


@pytest.mark.parametrize("config", examples())
def test_the_command_of_settings_gives_the_same_settings(config: TrainConfig):
    program, *arguments = shlex.split(as_command(asdict(config)))
    assert program == "dpojax"
    assert parse(arguments)[0] == config
