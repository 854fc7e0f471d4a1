"""The points of run.py as a picture and two tables.

Command: python experiments/imdb_sentiment/show.py --points runs/imdb/points.jsonl
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).parent
BOUNDS = (1, 2, 3, 5, 10, 20)  # nats
Row = dict[str, Any]


def main(
    points: Path = HERE / "points.jsonl", output: Path = HERE / "frontier.png"
) -> None:
    """Draws the reward over the KL; prints the frontiers and every policy.

    Args:
      points: what run.py wrote.
      output: the picture.
    """
    rows = [json.loads(line) for line in points.read_text("utf-8").splitlines()]
    draw(rows, output)
    print(frontiers(rows), policies(rows), sep="\n\n")


def family(row: Row) -> str:
    """The objective without its setting."""
    return row["name"].split(",")[0]


def by_policy(rows: list[Row]) -> dict[tuple, list[Row]]:
    """The rows of each objective, rate and step: one for each seed."""
    policies = defaultdict(list)
    for row in rows:
        policies[row["name"], row.get("rate"), row["step"]].append(row)
    return policies


def mean(rows: list[Row], key: str) -> float:
    """Of a figure, over seeds."""
    return float(np.mean([row[key] for row in rows]))


def draw(rows: list[Row], output: Path) -> None:
    """A dot for each policy, a mean over seeds; best-of-N, bounds of KL, as a line."""
    figure = Figure(figsize=(8, 5.5))
    panel = figure.subplots()
    families = defaultdict(list)
    for own in by_policy(rows).values():
        families[family(own[0])].append((mean(own, "kl"), mean(own, "reward")))
    for name, places in families.items():
        x, y = zip(*sorted(places), strict=True)
        if name == "best of N":
            panel.plot(x, y, "k--", label=name)
        else:
            panel.scatter(x, y, s=90 if name == "SFT" else 22, label=name)
    panel.set_xscale("symlog", linthresh=1)
    panel.set_xlabel("KL(policy‖SFT) of a completion, nats")
    panel.set_ylabel("reward: the oracle's log-odds")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def frontiers(rows: list[Row]) -> str:
    """The highest reward that each objective has within a KL, in Markdown.

    Of the policies whose mean KL is within the bound, the one of the highest mean
    reward: over settings, rates and steps.
    """
    families = defaultdict(list)
    for own in by_policy(rows).values():
        families[family(own[0])].append(own)
    head = " | ".join(f"KL up to {bound}" for bound in BOUNDS)
    lines = [f"| objective | {head} |", "|---" * (len(BOUNDS) + 1) + "|"]
    for name, policies in families.items():
        cells = [name]
        for bound in BOUNDS:
            within = [own for own in policies if mean(own, "kl") <= bound]
            best = max(within, key=lambda own: mean(own, "reward"), default=[])
            cells.append(with_error(best, "reward"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def policies(rows: list[Row]) -> str:
    """Each policy at each step, in Markdown; means and standard errors over seeds.

    With one seed the standard error is that over the prompts.
    """
    head = "policy | rate | step | seeds | reward | p(positive) | KL, nats | KL a token"
    lines = [f"| {head} | reverse KL a token |", "|---" * 9 + "|"]
    keys = "reward", "positive", "kl", "kl_per_token", "reverse_per_token"
    for (name, rate, step), own in by_policy(rows).items():
        cells = [name, "" if rate is None else f"{rate:g}", str(step), str(len(own))]
        cells += [with_error(own, key) for key in keys]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_error(rows: list[Row], key: str) -> str:
    """Mean and standard error of a figure; nothing where it was not measured."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    if len(values) == 1:
        error = rows[0].get(f"{key}_se")
        return f"{values[0]:.3f}" + ("" if error is None else f" ± {error:.3f}")
    error = np.std(values) / np.sqrt(len(values) - 1)
    return f"{np.mean(values):.3f} ± {error:.3f}"


if __name__ == "__main__":
    tyro.cli(main)
