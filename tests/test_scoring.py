"""The score command: whole runs on a tiny reward model, and what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpojax.cli import main
from dpojax.command_config import InitConfig, ScoreConfig
from dpojax.commands import init
from dpojax.data.packing import Example
from dpojax.data.records import Record
from dpojax.data.synthetic import make_tokenizer
from dpojax.data.tokenize import tokenize_records
from dpojax.loading import load_reward_model
from dpojax.models.huggingface import write_model
from dpojax.placing import Keeping
from dpojax.scoring import make_score_step, ranking_accuracy, score, score_examples
from dpojax.sharding import make_mesh, make_placement

PROMPTS = [f"I saw this {thing}" for thing in ("film", "movie", "comedy", "drama")]
GOOD, BAD = " and it was good.", " and I hated it, the acting was bad."
PAIRS = [{"prompt": text, "chosen": GOOD, "rejected": BAD} for text in PROMPTS]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal model with the embedded task's tokenizer."""
    directory = tmp_path_factory.mktemp("models")
    make_tokenizer().save_pretrained(directory / "tokenizer")
    tokenizer = str(directory / "tokenizer")
    output = str(directory / "tiny")
    return init(InitConfig(output=output, tokenizer=tokenizer, preset="tiny"))


@pytest.fixture(scope="module")
def reward(causal: Path) -> Path:
    """A reward model with a random head."""
    made = load_reward_model(str(causal), Keeping(make_mesh()), seed=0)
    directory = causal.with_name("reward")
    save = made.tokenizer.save_pretrained
    write_model(directory, made.params, made.settings, save)
    return directory


@pytest.fixture
def run(reward: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Scores rows; returns what was written."""

    def run(rows: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        output = tmp_path / f"scored-{len(list(tmp_path.iterdir()))}" / "scored.jsonl"
        config = ScoreConfig(model=str(reward), data=str(data), output=str(output))
        assert score(replace(config, **settings)) == output
        assert [path.name for path in output.parent.iterdir()] == [output.name]
        return [json.loads(line) for line in output.read_text("utf-8").splitlines()]

    return run


def directly(reward: Path, rows: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """Each text as one plain sequence, whose last input is its EOS."""
    loaded = load_reward_model(str(reward), Keeping(make_mesh()))
    records = [
        Record(row["prompt"], (row[name],), "here")
        for row in rows
        for name in ("chosen", "rejected")
    ]
    examples = [
        Example(example.prompt, (np.append(example.completions[0], 0),))
        for example in tokenize_records(records, loaded.tokenizer)[0]
    ]
    step, how = make_score_step(loaded.model.apply), make_placement(make_mesh())
    scores = score_examples(step, loaded.params, examples, batch_size=8, placement=how)
    return list(zip(*2 * [iter(values[0] for values in scores)], strict=True))


def test_pairs_are_scored_in_the_order_of_the_data(
    run: Callable, reward: Path, capsys: pytest.CaptureFixture[str]
):
    found = run(PAIRS, batch_size=3)
    assert [line.keys() for line in found] == 4 * [{"prompt", "completions", "scores"}]
    assert [line["prompt"] for line in found] == PROMPTS
    assert [line["completions"] for line in found] == 4 * [[GOOD, BAD]]
    scores = np.array([line["scores"] for line in found])
    np.testing.assert_allclose(scores, directly(reward, PAIRS), rtol=1e-4, atol=1e-5)
    assert scores.std() > 0.1
    accuracy = np.mean(scores[:, 0] > scores[:, 1])
    printed = capsys.readouterr().out
    assert f"rewards/accuracies   {accuracy:.4f}" in printed.replace("│", " ")


def test_a_score_does_not_depend_on_what_it_is_compared_with(
    run: Callable, capsys: pytest.CaptureFixture[str]
):
    """Not even where prompts are cut: the longer completion leaves less room."""
    long = [row | {"prompt": 4 * (row["prompt"] + " and ")} for row in PAIRS]
    singles = [
        {"prompt": row["prompt"], "completion": row[name]}
        for row in long
        for name in ("chosen", "rejected")
    ]
    together = run(long, max_length=20)
    assert "0 prompts cut" not in capsys.readouterr().out
    apart = run(singles, max_length=20)
    assert "accuracies" not in capsys.readouterr().out
    expected = [value for line in apart for value in line["scores"]]
    found = [value for line in together for value in line["scores"]]
    assert len(found) == 8
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_lists_of_completions_are_scored_in_their_order(run: Callable):
    pairs = run(PAIRS[:1])[0]
    row = {
        "prompt": PAIRS[0]["prompt"],
        "completions": [PAIRS[0][name] for name in ("rejected", "chosen", "rejected")],
        "scores": [0.0, 1.0, 0.0],
    }
    (ranking,) = run([row])
    expected = [pairs["scores"][place] for place in (1, 0, 1)]
    np.testing.assert_allclose(ranking["scores"], expected, rtol=1e-5, atol=1e-6)


def test_identical_completions_are_scored_but_not_ranked(
    run: Callable, capsys: pytest.CaptureFixture[str]
):
    found = run([PAIRS[0], *(row | {"rejected": GOOD} for row in PAIRS)])
    scores = np.array([line["scores"] for line in found])
    np.testing.assert_allclose(scores[1:, 0], scores[1:, 1], rtol=1e-5, atol=1e-6)
    assert "1 pairs as the reward model ranks them" in capsys.readouterr().out


def test_by_hand_the_accuracy_counts_a_tie_one_half():
    """Right, right, tie, wrong: mean 2.5 / 4, and squares 2.25 / 4.

    The variance is 0.5625 - 0.390625 = 0.171875; over 3 its root is 0.23936.
    """
    found = ranking_accuracy([(2, 1), (0, -3), (1, 1), (-1, 0)])
    assert found["rewards/accuracies"] == 0.625
    assert found["rewards/accuracies_se"] == pytest.approx(0.23936, abs=1e-5)
    assert found["rewards/margins"] == pytest.approx(3 / 4)


def test_a_model_whose_scores_are_not_finite_leaves_no_file(
    reward: Path, tmp_path: Path
):
    made = load_reward_model(str(reward), Keeping(make_mesh()))
    # Finite, as weights that are read must be; the products with hidden states are not.
    head = made.params["score"]["embedding"]
    made.params["score"]["embedding"] = np.full_like(head, 3e38)
    save = made.tokenizer.save_pretrained
    write_model(tmp_path / "broken", made.params, made.settings, save)
    data, output = tmp_path / "pairs.jsonl", tmp_path / "scored.jsonl"
    data.write_text(json.dumps(PAIRS[0]))
    config = ScoreConfig(
        model=str(tmp_path / "broken"), data=str(data), output=str(output)
    )
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 1: .*not finite"):
        score(config)
    assert not output.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--model", "CAUSAL"], "is a causal language model, which gives no reward"),
        (["--batch-size", "0"], "batch_size is 0; it must be positive"),
        (["--output", "pairs.jsonl"], "pairs.jsonl already exists; choose another"),
        (["--max-length", "4000"], "exceed the 2048 positions of the model"),
        (["--mesh.data", "3"], "does not fit 4 devices"),
        (["--data", "none.jsonl"], "There is no file or directory none.jsonl"),
        (["--split", "train"], "line 1 has no 'chosen'"),
    ],
)
def test_what_score_cannot_do_is_refused_in_one_sentence(
    settings: list[str],
    message: str,
    causal: Path,
    reward: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "I", "rejected": "."}))
    flags = {"--model": str(reward), "--data": "pairs.jsonl", "--output": "new.jsonl"}
    flags[settings[0]] = settings[1].replace("CAUSAL", str(causal))
    with pytest.raises(SystemExit) as stopped:
        main(["score", *(word for pair in flags.items() for word in pair)])
    printed = capfd.readouterr().err
    assert stopped.value.code == 2
    assert "dpojax: error: " in printed and message in printed
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
