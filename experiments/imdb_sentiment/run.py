"""The DPO paper's controlled sentiment on IMDb: from raw reviews to the frontier.

Question: at every KL, do DPO's policies earn a higher reward than those of
preferred-FT and of unlikelihood (Rafailov et al. 2023, Figure 2, left)?
Command: python experiments/imdb_sentiment/run.py --output runs/imdb --size small
Hardware, time and result: README.md beside this file.

Each stage writes its outputs whole, and a second start skips what is done. A directory
belongs to one size; another is refused. Needs scikit-learn.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from language import (
    language_run,
    write_beginnings,
    write_new_model,
    write_pieces,
)
from objectives import OBJECTIVES, Policy, alignment
from oracle import Oracle, cut, fit_oracle, load_oracle
from policies import Writer, measure, standard_error
from preferences import best_of, best_of_kl, make_pairs
from reviews import Review, openings, read_reviews
from sizes import SIZES, Size

from dpojax.checkpoint import Checkpoints, find_newest
from dpojax.compilation_cache import use_compilation_cache
from dpojax.config import TrainConfig
from dpojax.loading import Loaded, load_model
from dpojax.placing import Keeping
from dpojax.progress import say
from dpojax.resume import abstract
from dpojax.run import run_to_end
from dpojax.sharding import make_mesh
from dpojax.whole_files import write_json_lines

IMDB = Path(os.environ.get("DPOJAX_SHARED", "../shared")) / "data" / "imdb"


def main(
    output: Path,
    size: Literal["tiny", "small", "large"] = "small",
    seeds: int = 3,
    only: tuple[str, ...] = (),
) -> None:
    """Runs what is not done yet; points.jsonl has a line for each policy measured.

    Args:
      output: directory of everything.
      size: small for two CPU cores, large for one GPU, tiny to see that it works.
      seeds: each objective is run with seeds 0, 1, ...
      only: names of objectives; by default all.
    """
    use_compilation_cache()
    chosen = SIZES[size]
    check_settings(output / "size.json", asdict(chosen))
    make_language_model(output, chosen)
    oracle = make_oracle(output, chosen)
    sft = load_model(str(output / "sft" / "final"), Keeping(make_mesh()))
    make_preferences(output, chosen, sft, oracle)
    held_out = read_lines(output / "held_out.jsonl")
    prompts = [row["prompt"] for row in held_out]
    writer = Writer(sft, chosen.length)
    points = output / "points.jsonl"
    measure_sft(points, writer, prompts, oracle, seeds)
    measure_best_of(points, chosen, sft, prompts, oracle)
    # Seed by seed, so that what is there at any time compares the objectives.
    for seed in range(seeds):
        for rate, name in product(chosen.learning_rates, only or OBJECTIVES):
            policy = Policy(name, rate, seed)
            if policy not in {made_by(row) for row in read_lines(points)}:
                rows = align(output, chosen, writer, prompts, oracle, policy)
                add_lines(points, rows)


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings of a directory; refuses to go on with others."""
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_json_lines(path, [settings])
    elif (found := read_lines(path)[0]) != settings:
        changed = [name for name in settings if found.get(name) != settings[name]]
        raise ValueError(
            f"{path.parent} was made with another size ({', '.join(changed)} differ); "
            "choose another --output."
        )


def make_language_model(output: Path, size: Size) -> None:
    """Tokenizer, pre-training and SFT."""
    if not (output / "beginnings.jsonl").exists():
        train = read_reviews(IMDB / "train.jsonl.gz", size.num_reviews)
        every = train + read_reviews(IMDB / "unsup.jsonl.gz", size.num_reviews)
        say("Training the tokenizer")
        write_new_model(output / "new", (review.text for review in every), size)
        write_pieces(output / "pieces.jsonl", every, size.window)
        write_beginnings(output / "beginnings.jsonl", train, size.length)
    for name, start, data, steps, rate in (
        ("pretrained", "new", "pieces", size.pretrain_steps, size.pretrain_rate),
        ("sft", "pretrained/final", "beginnings", size.sft_steps, size.sft_rate),
    ):
        path = output / f"{data}.jsonl"
        continued(
            language_run(
                output / start, path, output / name, size, steps=steps, rate=rate
            )
        )


def continued(config: TrainConfig) -> None:
    """A run, from its last checkpoint where it has one; nothing if it has ended."""
    assert config.output is not None
    directory = Path(config.output)
    if (directory / "final").exists():
        return
    resume = find_newest(directory / "checkpoints").step is not None
    if not resume:
        shutil.rmtree(directory, ignore_errors=True)
    run_to_end(replace(config, resume=resume))


def make_oracle(output: Path, size: Size) -> Oracle:
    """The classifier, and its accuracy on reviews that it has not seen."""
    path = output / "oracle.npz"
    if not path.exists():
        say("Fitting the oracle")
        oracle = fit_oracle(read_reviews(IMDB / "train.jsonl.gz", size.num_reviews))
        test = read_reviews(IMDB / "test.jsonl.gz", size.num_reviews)
        accuracy = {
            "whole": oracle.accuracy(test),
            "pieces": oracle.accuracy(cut(test, seed=1)),
            "reviews": len(test),
        }
        say(f"Accuracy of the oracle: {accuracy}")
        write_json_lines(output / "oracle.jsonl", [accuracy])
        oracle.save(path)
    return load_oracle(path)


def make_preferences(output: Path, size: Size, sft: Loaded, oracle: Oracle) -> None:
    """Held-out prompts, and pairs of what the SFT model writes for others."""
    if (output / "pairs.jsonl").exists():
        return
    say("Sampling and labelling")

    def prompts(split: str, number: int, without: set[str]) -> list[str]:
        reviews = read_reviews(IMDB / f"{split}.jsonl.gz", size.num_reviews)
        found = openings(
            [Review(review.text, None) for review in reviews],
            sft.tokenizer,
            number + len(without),
            seed=1,
        )
        return [text for text in found if text not in without][:number]

    held_out = prompts("test", size.num_held_out, set())
    write_json_lines(output / "held_out.jsonl", ({"prompt": p} for p in held_out))
    chosen = prompts("train", size.num_prompts, set(held_out))
    number = size.num_completions
    written = Writer(sft, size.length, number).write(sft.params, chosen, seed=1)
    scores = oracle.log_odds(written.whole).tolist()
    rows: list[dict[str, Any]] = []
    for index, prompt in enumerate(chosen):
        own = slice(index * number, (index + 1) * number)
        kept = [
            (text, score)
            for text, score in zip(written.texts[own], scores[own], strict=True)
            if text.strip()  # what says nothing is no completion
        ]
        rows += make_pairs(prompt, [t for t, _ in kept], [s for _, s in kept])
    write_json_lines(output / "pairs.jsonl", rows)


def measure_sft(
    points: Path, writer: Writer, prompts: list[str], oracle: Oracle, seeds: int
) -> None:
    """The point where every run begins: KL exactly 0."""
    done = {r["seed"] for r in read_lines(points) if r["name"] == "SFT"}
    for seed in set(range(seeds)) - done:
        found = measure(writer, writer.sft.params, prompts, oracle, seed)
        add_lines(points, [{"name": "SFT", "seed": seed, "step": 0, **found}])


def measure_best_of(
    points: Path, size: Size, sft: Loaded, prompts: list[str], oracle: Oracle
) -> None:
    """What choosing among the SFT model's samples would earn, and its bound on KL."""
    if any(row["name"] == "best of N" for row in read_lines(points)):
        return
    most = max(size.best_of)
    written = Writer(sft, size.length, most).write(sft.params, prompts, seed=2)
    scores = oracle.log_odds(written.whole).reshape(-1, most)
    rows = [
        {
            "name": "best of N",
            "seed": 0,
            "step": number,
            "reward": float(np.mean(best_of(scores, number))),
            "reward_se": standard_error(best_of(scores, number)),
            "kl": best_of_kl(number),
            "kl_se": 0.0,
        }
        for number in size.best_of
    ]
    add_lines(points, rows)


def align(
    output: Path,
    size: Size,
    writer: Writer,
    prompts: list[str],
    oracle: Oracle,
    policy: Policy,
) -> list[dict[str, Any]]:
    """One run of an objective, measured several times; its weights are not kept."""
    start = time.perf_counter()
    place = output / "aligning"
    shutil.rmtree(place, ignore_errors=True)
    say(f"Aligning: {policy.name}, rate {policy.rate:g}, seed {policy.seed}")
    model = output / "sft" / "final"
    run_to_end(alignment(policy, model, output / "pairs.jsonl", place, size))
    like = {"params": jax.tree.map(abstract, writer.sft.params)}
    checkpoints = Checkpoints(place / "checkpoints", read_only=True)
    rows = []
    for step in checkpoints.steps:
        params = checkpoints.restore(step, like)["params"]
        found = measure(writer, params, prompts, oracle, policy.seed)
        rows.append(policy._asdict() | {"step": step} | found)
        say(f"step {step}: reward {found['reward']:.3f}, KL {found['kl']:.2f}")
    checkpoints.close()
    shutil.rmtree(place)
    seconds = time.perf_counter() - start
    return [row | {"seconds": round(seconds, 1)} for row in rows]


def made_by(row: dict[str, Any]) -> Policy:
    """Whose line it is; the SFT model and best-of-N have no rate."""
    return Policy(row["name"], row.get("rate", 0.0), row["seed"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; none where it is absent."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def add_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows, all or none."""
    write_json_lines(path, read_lines(path) + rows)


if __name__ == "__main__":
    tyro.cli(main)
