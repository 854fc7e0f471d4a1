"""Whole runs of objectives of every kind: what they train, carry on and leave.

Two steps of a tiny model; the numbers of the losses are other tests' concern.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpojax.cli import main
from dpojax.command_config import EvalConfig, InitConfig
from dpojax.commands import evaluate_policy, init
from dpojax.config import LossConfig, MovingConfig, OptimizerConfig, TrainConfig
from dpojax.data.labels import label_pairs, rank_completions
from dpojax.data.packing import Example
from dpojax.data.synthetic import make_reviews, make_tokenizer, split_review
from dpojax.examples import balance_advice
from dpojax.prepare import make_configured_loss
from dpojax.run import Result, run

OWN_LOSS = """
from jax.nn import log_sigmoid
from dpojax.losses.scores import Outcome, Scores


def mine(chosen: Scores, rejected: Scores, *, beta: float = 0.1) -> Outcome:
    rewards = beta * chosen.log_ratio, beta * rejected.log_ratio
    return Outcome(-2 * log_sigmoid(rewards[0] - rewards[1]), rewards)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model, twenty pairs and twenty rankings of three."""
    directory = tmp_path_factory.mktemp("objectives")
    make_tokenizer().save_pretrained(directory / "tokenizer")
    tokenizer, model = str(directory / "tokenizer"), str(directory / "model")
    init(InitConfig(output=model, tokenizer=tokenizer, preset="tiny"))
    reviews = [split_review(review) for review in make_reviews(150, seed=0)]
    openings = [opening for opening, _ in reviews[::3]]
    groups = [[rest for _, rest in reviews[at : at + 3]] for at in range(0, 150, 3)]
    for name, make in (("pairs", label_pairs), ("rankings", rank_completions)):
        rows = make(openings, groups)[:20]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return directory


def settings(place: Path, name: str, data: str = "pairs", **more: Any) -> TrainConfig:
    return TrainConfig(
        model=str(place / "model"),
        data=(str(place / f"{data}.jsonl"),),
        output=str(place / name),
        loss=LossConfig(name=name),
        test_size=4,
        max_length=96,
        batch_size=4,
        steps=2,
        log_every=1,
        sample_prompts=0,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        **more,
    )


def rows_of(result: Result, split: str) -> list[dict[str, float]]:
    lines = (result.directory / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def test_kto_judges_pairs_one_by_one_against_mismatched_completions(place: Path):
    result = run(settings(place, "kto"))
    assert result.first_evaluation["kl"] == 0
    assert result.first_evaluation["loss"] == pytest.approx(0.5, abs=1e-6)
    assert result.last_evaluation["rewards/margins"] != 0
    assert np.isfinite(result.last_evaluation["rewards/margins_se"])


def test_rankings_are_trained_on_and_measured(place: Path):
    result = run(settings(place, "plackett_luce", "rankings"))
    assert result.first_evaluation["rewards/rank_accuracies"] == 0.5
    assert result.last_evaluation["loss"] != result.first_evaluation["loss"]


def test_pairs_of_rankings_know_their_scores(place: Path):
    result = run(settings(place, "odpo", "rankings", pairs_from="all"))
    assert np.isfinite(result.last_evaluation["loss"])


def test_each_term_of_a_sum_is_logged(place: Path):
    rows = rows_of(run(settings(place, "mpo")), "train")
    for row in rows:
        dpo, bco, sft = (row[f"loss/{name}"] for name in ("dpo", "bco_pair", "sft"))
        assert row["loss"] == pytest.approx(0.8 * dpo + 0.2 * bco + sft, rel=1e-5)


def test_a_reward_model_is_trained_and_evaluated(place: Path):
    result = run(settings(place, "bradley_terry"))
    assert "logps/chosen" not in result.last_evaluation
    final = str(result.directory / "final")
    values = evaluate_policy(
        EvalConfig(
            model=final,
            data=(str(place / "pairs.jsonl"),),
            loss=LossConfig(name="bradley_terry"),
            test_size=4,
            max_length=96,
        )
    )
    assert values["loss"] == pytest.approx(result.last_evaluation["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "moving"),
    [("bco", MovingConfig()), ("beta_dpo", MovingConfig(kind="bema", every=1))],
)
def test_statistics_and_moving_references_resume_bit_for_bit(
    place: Path, name: str, moving: MovingConfig
):
    whole = replace(settings(place, name, moving=moving), steps=3)
    parts = replace(whole, output=str(place / f"{name} in parts"))
    first = run(whole)
    run(replace(parts, stop_after=2))
    second = run(replace(parts, resume=True))
    expected = load_file(first.directory / "final" / "model.safetensors")
    found = load_file(second.directory / "final" / "model.safetensors")
    for key, array in expected.items():
        np.testing.assert_array_equal(array, found[key], err_msg=key)
    last = [rows_of(result, "train")[-1] for result in (first, second)]
    logged = "delta" if name == "bco" else "beta"
    assert last[0][logged] == last[1][logged]


def test_a_loss_of_the_users_own_file_trains(place: Path, capsys: Any):
    own, output = place / "my_losses.py", place / "own"
    own.write_text(OWN_LOSS, encoding="utf-8")
    arguments = f"--model {place / 'model'} --data {place / 'pairs.jsonl'} --steps 1"
    more = f"--output {output} --loss {own}:mine --loss.beta 0.5 --test-size 4"
    main(["train", *arguments.split(), *more.split(), "--sample-prompts", "0"])
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    assert json.loads(lines[0])["loss"] == pytest.approx(2 * np.log(2), rel=1e-6)
    with pytest.raises(ValueError, match=r"has no loss 'yours'; it has mine"):
        make_configured_loss(LossConfig(name=f"{own}:yours"))


def test_unbalanced_labels_are_told():
    good, bad = (
        Example(np.ones(1, np.int32), (np.ones(1, np.int32),), (score,))
        for score in (1.0, 0.0)
    )
    kto = make_configured_loss(LossConfig(name="kto"))
    assert balance_advice(kto, [good, bad]) is None
    advice = balance_advice(kto, [good, bad, bad])
    assert advice is not None and "1 desirable and 2 undesirable" in advice
    weighted = LossConfig(name="kto", desirable_weight=2.0)
    assert balance_advice(make_configured_loss(weighted), [good, bad, bad]) is None
    dpo = make_configured_loss(LossConfig())
    assert balance_advice(dpo, [good, bad, bad]) is None


def test_scores_that_are_no_probabilities_are_refused(place: Path):
    with pytest.raises(ValueError, match="sppo takes win probabilities as scores"):
        run(settings(place, "sppo", "rankings"))
