"""The points of run.py as a picture and a table.

Command: python experiments/imdb_sentiment/show.py --points runs/imdb/points.jsonl
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).parent


def main(
    points: Path = HERE / "points.jsonl", output: Path = HERE / "frontier.png"
) -> None:
    """Draws the reward over the KL and prints the table.

    Args:
      points: what run.py wrote.
      output: the picture.
    """
    rows = [json.loads(line) for line in points.read_text("utf-8").splitlines()]
    draw(rows, output)
    print(table(rows))


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """A dot for each policy measured; best-of-N, whose KL is a bound, as a line."""
    figure = Figure(figsize=(8, 5.5))
    panel = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        x, y = [row["kl"] for row in own], [row["reward"] for row in own]
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


def table(rows: list[dict[str, Any]]) -> str:
    """Each policy at each step, in Markdown; means and standard errors over seeds.

    With one seed the standard error is that over the prompts.
    """
    head = "policy | step | seeds | reward | p(positive) | KL, nats | KL a token"
    lines = [f"| {head} | reverse KL a token |", "|---" * 8 + "|"]
    for name, step in dict.fromkeys((row["name"], row["step"]) for row in rows):
        own = [row for row in rows if (row["name"], row["step"]) == (name, step)]
        cells = [name, str(step), str(len(own))]
        cells += [with_error(own, key) for key in ("reward", "positive", "kl")]
        cells += [with_error(own, key) for key in ("kl_per_token", "reverse_per_token")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_error(rows: list[dict[str, Any]], key: str) -> str:
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
