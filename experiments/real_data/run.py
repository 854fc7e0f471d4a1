"""Objectives of every kind on real data: pairs, labels and rankings that people made.

Claim: each runs to the end on two CPU cores, and the standard error of its held-out
figures says how little a model of this size learns from so few examples.
Command: python experiments/real_data/run.py --output runs/real-data
Hardware, time and result: README.md beside this file; the command prints its table.

A new model of 3.3 million parameters imitates what is good in a data set (SFT), then an
objective starts from there. The same command continues where it was stopped.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

from dpojax.command_config import InitConfig
from dpojax.commands import init
from dpojax.config import LossConfig, OptimizerConfig, TrainConfig
from dpojax.run import run_to_end

SHARED = Path(os.environ.get("DPOJAX_SHARED", "../shared"))


class DataSet(NamedTuple):
    """A file, what it is tried with, and how much of it is used."""

    file: str
    losses: tuple[str, ...]
    max_length: int = 256
    max_examples: int | None = None


DATA = (
    DataSet("gsm8k_test_solution_labels", ("kto", "bco"), 192, 600),
    DataSet("llamafactory_kto_en_demo", ("kto", "bco")),
    DataSet("imdb_scored_completions_odpo", ("plackett_luce", "infonca", "odpo"), 128),
    DataSet("tldr_scored_summaries_odpo_train", ("plackett_luce", "infonca", "odpo")),
    DataSet("pandalm_human_pairs", ("simpo", "ipo", "orpo")),
    DataSet("llamafactory_dpo_en_demo", ("simpo", "ipo", "orpo")),
)
# Of the last evaluation, each with its standard error.
FIGURES = ("loss", "rewards/accuracies", "rewards/rank_accuracies", "rewards/margins")


def main(output: Path, only: tuple[str, ...] = ()) -> None:
    """Runs what is not done yet, then prints the table.

    Args:
      output: directory of all the runs; results.jsonl in it has one line for each.
      only: names of data files, without their ending; by default all.
    """
    # Most of the programs are the same from run to run.
    jax.config.update("jax_compilation_cache_dir", str(output / "cache"))
    results = output / "results.jsonl"
    model = output / "model"
    if not model.exists():
        init(
            InitConfig(
                output=str(model),
                tokenizer=str(SHARED / "tokenizers" / "gpt2_encoder.json"),
                chat_template=str(Path(__file__).parent / "chat_template.jinja"),
                preset="tiny",
            )
        )
    for data in DATA:
        if only and data.file not in only:
            continue
        start = output / data.file / "sft" / "final"
        if not start.exists():
            _run(data, "sft", model, 2e-3, output)
        for loss in data.losses:
            if (data.file, loss) not in {
                (r["data"], r["objective"]) for r in _read(results)
            }:
                line = _run(data, loss, start, 3e-4, output)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    print(_table(_read(results)))


def _run(
    data: DataSet, loss: str, model: Path, learning_rate: float, output: Path
) -> dict[str, Any]:
    start = time.perf_counter()
    result = run_to_end(
        TrainConfig(
            model=str(model),
            data=(str(SHARED / "data" / f"{data.file}.jsonl.gz"),),
            output=str(output / data.file / loss),
            loss=LossConfig(name=loss),
            max_length=data.max_length,
            max_examples=data.max_examples,
            test_size=0.1,
            batch_size=16,
            evaluate_every=1_000,
            save_every=1_000,
            sample_prompts=0,
            optimizer=OptimizerConfig(learning_rate=learning_rate),
        )
    )
    last = result.last_evaluation
    figures = {
        name: (last[name], last.get(name + "_se")) for name in FIGURES if name in last
    }
    seconds = time.perf_counter() - start
    return {"data": data.file, "objective": loss, "seconds": seconds} | figures


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _table(results: list[dict[str, Any]]) -> str:
    lines = [f"| data | objective | {' | '.join(FIGURES)} | s |", "|---" * 7 + "|"]
    for row in results:
        figures = " | ".join(_figure(row.get(name)) for name in FIGURES)
        cells = row["data"], f"`{row['objective']}`", figures, f"{row['seconds']:.0f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(value: list[float | None] | None) -> str:
    if value is None:
        return ""
    mean, error = value
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


if __name__ == "__main__":
    tyro.cli(main)
