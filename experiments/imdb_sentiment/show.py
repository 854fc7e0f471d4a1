"""The points of run.py as a picture and two tables.

Command: python experiments/imdb_sentiment/show.py --points runs/imdb/points.jsonl
"""

import csv
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("DPOJAX_SHARED", "../shared"))
PUBLISHED = SHARED / "reference" / "discopop_imdb_frontier.csv"
BOUNDS = (1, 2, 3, 5, 10, 20)  # nats
Row = dict[str, Any]


def main(
    points: Path = HERE / "points.jsonl",
    output: Path = HERE / "frontier.png",
    published: Path = PUBLISHED,
) -> None:
    """Draws the frontiers; prints them, and every policy.

    Args:
      points: what run.py wrote.
      output: the picture.
      published: DiscoPOP's points, beside which ours are drawn.
    """
    rows = [json.loads(line) for line in points.read_text("utf-8").splitlines()]
    draw(rows, published_means(published), output)
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


def published_means(path: Path) -> dict[str, list[tuple[float, float]]]:
    """KL and reward of each beta, means over seeds, by objective."""
    found = defaultdict(lambda: defaultdict(list))
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if not row["kl_divergence"]:  # a run that diverged
                continue
            place = float(row["kl_divergence"]), float(row["reward"])
            found[row["loss"]][float(row["beta"])].append(place)
    return {
        loss: [tuple(np.mean(places, axis=0)) for _, places in sorted(betas.items())]
        for loss, betas in found.items()
    }


def draw(
    rows: list[Row], published: dict[str, list[tuple[float, float]]], output: Path
) -> None:
    """Left the paper's axes, right those of the published sweep, whose models differ.

    A dot for each policy, a mean over seeds; best-of-N, bounds of KL, as a line.
    """
    figure = Figure(figsize=(13, 5.5))
    left, right = figure.subplots(1, 2)
    for panel, x, y in (
        (left, "kl", "reward"),
        (right, "reverse_per_token", "positive"),
    ):
        families = defaultdict(list)
        for own in by_policy(rows).values():
            if x in own[0]:
                families[family(own[0])].append((mean(own, x), mean(own, y)))
        for name, places in families.items():
            across, up = zip(*sorted(places), strict=True)
            if name == "best of N":
                panel.plot(across, up, "k--", label=name)
            else:
                panel.scatter(across, up, s=90 if name == "SFT" else 22, label=name)
        panel.grid(alpha=0.3)
    for loss in ("dpo", "hinge"):
        label = f"{loss}, published"
        right.plot(*zip(*published[loss], strict=True), "x-", label=label, alpha=0.6)
    left.set_xscale("symlog", linthresh=1)
    left.set_xlabel("KL(policy‖SFT) of a completion, nats")
    left.set_ylabel("reward: the oracle's log-odds")
    right.set_xscale("symlog", linthresh=0.1)
    right.set_xlabel("KL(SFT‖policy) a token of the policy's samples, nats")
    right.set_ylabel("probability that the text praises its film")
    for panel in (left, right):
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def frontiers(rows: list[Row]) -> str:
    """The highest reward that each objective has within a KL, in Markdown.

    Of the policies whose mean KL is within the bound, the one of the highest mean
    reward: over settings, rates and steps. Those that lack a seed are left out.
    """
    families = defaultdict(list)
    for own in by_policy(rows).values():
        families[family(own[0])].append(own)
    head = " | ".join(f"KL up to {bound}" for bound in BOUNDS)
    lines = [f"| objective | {head} |", "|---" * (len(BOUNDS) + 1) + "|"]
    for name, policies in families.items():
        cells, num_seeds = [name], max(map(len, policies))
        whole = [own for own in policies if len(own) == num_seeds]
        for bound in BOUNDS:
            within = [own for own in whole if mean(own, "kl") <= bound]
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
