"""Every objective on the embedded task: does it raise the exact reward of samples?

Claim: within a minute on two CPU cores each objective of the table makes a small model
write more positive reviews, or its row says why it does not.
Command: python experiments/objectives/run.py --output runs/objectives
Hardware, time and result: README.md beside this file; the command prints its table.

One SFT model and its samples serve all objectives of a seed. Losses have their default
settings, and the embedded task's optimiser, except where `RUNS` says otherwise. The
same command continues where it was stopped.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from dpojax.command_config import ScoreConfig
from dpojax.config import LossConfig, MovingConfig, OptimizerConfig, TrainConfig
from dpojax.data.synthetic import reward
from dpojax.data.tokenize import encode_prompt
from dpojax.evaluation import make_sampler
from dpojax.loading import load_model
from dpojax.losses.table import MIXTURES, OBJECTIVES
from dpojax.placing import Keeping
from dpojax.prepare import make_configured_loss
from dpojax.run import run_to_end
from dpojax.scoring import score
from dpojax.sentiment import MAX_LENGTH, Task, alignment_config, make_task, sample
from dpojax.sharding import make_mesh, make_placement

FORGETS = "forgets the worst completions; learning faster, it forgets the language"
CANDIDATES = 8  # completions of each held-out opening that a reward model chooses from


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run whose settings are not the defaults, and why."""

    loss: LossConfig
    moving: MovingConfig = field(default_factory=MovingConfig)
    learning_rate: float = 7e-4
    data: Literal["by kind", "worst", "probabilities", "rso"] = "by kind"
    note: str = ""


RUNS = {name: Setup(loss=LossConfig(name=name)) for name in (*OBJECTIVES, *MIXTURES)}
RUNS |= {
    "apo_down": Setup(
        loss=LossConfig(name="apo_down"),
        learning_rate=1e-4,
        note="lowers both rewards, for a policy better than its data; here the data "
        "are the policy's own best samples, and faster learning leaves the language",
    ),
    "bradley_terry": Setup(
        loss=LossConfig(name="bradley_terry"),
        note=f"the reward model chooses the best of {CANDIDATES} reference samples",
    ),
    "npo": Setup(
        loss=LossConfig(name="npo"),
        learning_rate=5e-5,
        data="worst",
        note=FORGETS,
    ),
    "simnpo": Setup(
        loss=LossConfig(name="simnpo"),
        learning_rate=5e-5,
        data="worst",
        note=FORGETS,
    ),
    "sppo": Setup(
        loss=LossConfig(name="sppo"),
        data="probabilities",
        note="scores are shares of the other completions beaten",
    ),
    "hinge, pairs by rso": Setup(
        loss=LossConfig(name="hinge"), data="rso", note="pairs by rejection sampling"
    ),
    "dpo, tr_dpo": Setup(
        loss=LossConfig(), moving=MovingConfig(kind="tr_dpo", every=16)
    ),
    "dpo, bema": Setup(loss=LossConfig(), moving=MovingConfig(kind="bema", every=16)),
}


def main(output: Path, seeds: int = 3, only: tuple[str, ...] = ()) -> None:
    """Runs what is not done yet, then prints the table.

    Args:
      output: directory of all the runs; results.jsonl in it has one line for each.
      seeds: each objective is run with seeds 0, 1, ...
      only: names of runs; by default all.
    """
    # Most of the programs are the same from run to run.
    jax.config.update("jax_compilation_cache_dir", str(output / "cache"))
    results = output / "results.jsonl"
    for name in only or RUNS:
        for seed in range(seeds):
            if (name, seed) in {(r["name"], r["seed"]) for r in _read(results)}:
                continue
            task, before = _task(output / str(seed), seed)
            line = {"name": name, "seed": seed, "before": before}
            line |= _measure(task, RUNS[name])
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
    print(_table(_read(results)))


def _task(directory: Path, seed: int) -> tuple[Task, float]:
    """The embedded task's first half, and its model's mean reward; made once."""
    saved = directory / "task.json"
    if saved.exists():
        before, *fields = json.loads(saved.read_text("utf-8"))
        return Task(directory, *fields), before
    task = make_task(directory, TrainConfig(seed=seed))
    model = load_model(task.model, Keeping(make_mesh()))
    before = float(sample(model, model, task.held_out, seed).rewards.mean())
    saved.write_text(json.dumps([before, *task[1:]]), encoding="utf-8")
    return task, before


def _measure(task: Task, setup: Setup) -> dict[str, Any]:
    """Aligns the task's model and samples what comes of it."""
    start = time.perf_counter()
    loss = make_configured_loss(setup.loss)
    config = TrainConfig(
        seed=int(task.directory.name),
        loss=setup.loss,
        moving=setup.moving,
        optimizer=OptimizerConfig(learning_rate=setup.learning_rate, beta2=0.99),
    )
    config = alignment_config(task, config, loss)
    name = f"{loss.name}-{setup.moving.kind}-{setup.data}-{time.time_ns()}"
    config = replace(
        config,
        data=(_data(task, setup, config.data[0]),),
        output=str(task.directory / name),
        epochs=None,
        # Of 16 examples: every opening once; a third of them with all completions.
        steps=24 if loss.kind == "ranked" else 72,
        pairs_from="rso" if setup.data == "rso" else "best_worst",
    )
    result = run_to_end(config)
    final, seed = str(result.directory / "final"), config.seed
    reference = load_model(task.model, Keeping(make_mesh()))
    if "reward_head" in loss.needs:
        after, kl = _best_of(task, final, reference, seed), None
    else:
        policy = load_model(final, Keeping(make_mesh()))
        samples = sample(policy, reference, task.held_out, seed)
        after, kl = samples.rewards, samples.kl["kl"]
    return {
        "after": float(np.mean(after)),
        "kl": kl,
        "accuracy": result.last_evaluation.get("rewards/accuracies"),
        "seconds": time.perf_counter() - start,
    }


def _data(task: Task, setup: Setup, by_kind: str) -> str:
    if setup.data == "by kind":
        return by_kind
    if setup.data == "rso":
        return task.rankings
    path = task.directory / f"{setup.data}.jsonl"
    rows = _lines(Path(task.pairs if setup.data == "worst" else task.rankings))
    make = _worst if setup.data == "worst" else _probabilities
    path.write_text("".join(json.dumps(make(row)) + "\n" for row in rows))
    return str(path)


def _worst(pair: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": pair["prompt"], "completion": pair["rejected"]}


def _probabilities(ranking: dict[str, Any]) -> dict[str, Any]:
    """Of each completion the share of the others that it beats, a tie counting half."""
    scores = np.array(ranking["scores"])
    wins = (1 + np.sign(scores[:, None] - scores)) / 2
    np.fill_diagonal(wins, 0)
    return ranking | {"scores": (wins.sum(1) / (len(scores) - 1)).tolist()}


def _best_of(task: Task, reward_model: str, writer: Any, seed: int) -> np.ndarray:
    """True rewards of the writer's samples that the reward model finds the best."""
    sampler = make_sampler(
        writer,
        num_new=MAX_LENGTH - 8,
        batch_size=256,
        placement=make_placement(make_mesh()),
    )
    repeated = [text for text in task.held_out for _ in range(CANDIDATES)]
    prompts = [encode_prompt(text, writer.tokenizer) for text in repeated]
    decode = writer.tokenizer.decode
    texts = [
        str(decode(tokens, skip_special_tokens=True)) or " "
        for tokens in sampler(writer.params, prompts, seed)
    ]
    place = Path(reward_model).parent
    with (place / "candidates.jsonl").open("w", encoding="utf-8") as file:
        for prompt, text in zip(repeated, texts, strict=True):
            file.write(json.dumps({"prompt": prompt, "completion": text}) + "\n")
    score(
        ScoreConfig(
            model=reward_model,
            data=str(place / "candidates.jsonl"),
            output=str(place / "scored.jsonl"),
            max_length=MAX_LENGTH,
            batch_size=64,
        )
    )
    rows = _lines(place / "scored.jsonl")
    given = np.array([row["scores"][0] for row in rows]).reshape(-1, CANDIDATES)
    whole = (prompt + text for prompt, text in zip(repeated, texts, strict=True))
    true = np.array([reward(text) for text in whole]).reshape(-1, CANDIDATES)
    return np.take_along_axis(true, given.argmax(1)[:, None], 1)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _read(path: Path) -> list[dict[str, Any]]:
    return _lines(path) if path.exists() else []


def _table(results: Iterable[dict[str, Any]]) -> str:
    """Means over seeds and their standard errors, in Markdown."""
    rows = list(results)
    names = dict.fromkeys(row["name"] for row in rows)
    head = "loss | learning rate | reward before | after | KL, nats | accuracy | s"
    lines = [f"| {head} | |", "|---" * 8 + "|"]
    for name in names:
        own = [row for row in rows if row["name"] == name]
        cells = [
            f"`{name}`",
            f"{RUNS[name].learning_rate:g}",
            *(_mean(own, key) for key in ("before", "after", "kl", "accuracy")),
            f"{max(row['seconds'] for row in own):.0f}",
            RUNS[name].note,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return ""
    error = np.std(values) / np.sqrt(max(1, len(values) - 1))
    return f"{np.mean(values):.2f} ± {error:.2f}"


if __name__ == "__main__":
    tyro.cli(main)
