"""IFEval of two or more policies: how many instructions each follows, and who more.

Command: python experiments/ifeval/run.py --policies before.jsonl runs/a/final
Each policy is a file of completions, as `dpojax generate --output` writes, or a model
directory, which is sampled first. Needs langdetect. Result: README.md beside this file.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from accuracy import MEASURES, Counts, accuracy, count, difference_interval, judge

from dpojax.command_config import GenerateConfig
from dpojax.sampling import generate
from dpojax.whole_files import write_json_lines

PROMPTS = Path(
    os.environ.get("DPOJAX_SHARED", "../shared"), "data/ifeval_prompts.jsonl"
)


def main(
    policies: tuple[str, ...],
    prompts: Path = PROMPTS,
    output: Path = Path("runs/ifeval"),
    max_new_tokens: int = 1024,
    most: int | None = None,
) -> None:
    """Prints the accuracies, and each policy's difference from the first.

    Args:
      policies: files of completions, or model directories.
      prompts: IFEval's prompts with their instructions.
      output: directory for the completions of model directories.
      max_new_tokens: most tokens of a completion of those.
      most: use the first prompts alone; by default all.
    """
    if len(policies) < 2:
        raise ValueError(f"{len(policies)} policies were given; give two or more.")
    rows = read_lines(prompts)[:most]
    counts = {}
    for index, policy in enumerate(policies):
        path = Path(policy)
        if path.is_dir():
            path = sample(policy, rows, output / str(index), max_new_tokens)
        counts[policy] = judged(rows, read_lines(path), policy)
    print(table(counts))


def sample(
    model: str, rows: Sequence[Mapping[str, Any]], place: Path, max_new_tokens: int
) -> Path:
    """Greedy completions of a model, unless they are there already."""
    asked, completions = place / "prompts.jsonl", place / "completions.jsonl"
    if not completions.exists():
        write_json_lines(asked, ({"prompt": row["prompt"]} for row in rows))
        generate(
            GenerateConfig(
                model=model,
                prompts_file=str(asked),
                output=str(completions),
                max_new_tokens=max_new_tokens,
                temperature=0.0,
            )
        )
    return completions


def judged(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Mapping[str, Any]],
    policy: str,
) -> Counts:
    """What a policy followed, its completions found by their prompts."""
    several = next((row for row in completions if len(row["completions"]) != 1), None)
    if several is not None:
        raise ValueError(
            f"{policy} has {len(several['completions'])} completions of a prompt; give "
            "one of each (dpojax generate --num-samples 1)."
        )
    given = {row["prompt"]: row["completions"][0] for row in completions}
    missing = [row["prompt"] for row in rows if row["prompt"] not in given]
    if missing:
        raise ValueError(
            f"{policy} has no completion of {len(missing)} of the {len(rows)} prompts; "
            f"the first is {missing[0][:60]!r}."
        )
    return count([judge(row, given[row["prompt"]]) for row in rows])


def table(counts: Mapping[str, Counts]) -> str:
    """Accuracies, and differences from the first policy with 95 % bounds."""
    first, *others = counts.items()
    lines = [f"| policy | {' | '.join(MEASURES)} |", "|---" * 5 + "|"]
    for name, own in counts.items():
        cells = (f"{value:.3f}" for value in accuracy(own))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, own in others:
        gain = accuracy(own) - accuracy(first[1])
        low, high = difference_interval(first[1], own)
        cells = (
            f"{g:+.3f} [{a:+.3f}, {b:+.3f}]"
            for g, a, b in zip(gain, low, high, strict=True)
        )
        lines.append(f"| {name} - {first[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


if __name__ == "__main__":
    tyro.cli(main)
