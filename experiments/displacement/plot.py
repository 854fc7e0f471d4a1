"""The curves of run.py as a picture and a table.

Command: python experiments/displacement/plot.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).parent


def main(
    curves: Path = HERE / "curves.jsonl", output: Path = HERE / "displacement.png"
) -> None:
    """Draws the log-ratios over the steps and prints where they end.

    Args:
      curves: what run.py wrote.
      output: the picture.
    """
    rows = [json.loads(line) for line in curves.read_text("utf-8").splitlines()]
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    figure = Figure(figsize=(3.2 * len(losses), 3.2))
    panels = figure.subplots(1, len(losses), sharey=True)
    for panel, loss in zip(panels, losses, strict=True):
        for side, colour in (("chosen", "tab:blue"), ("rejected", "tab:red")):
            steps, mean, error = over_seeds(rows, loss, f"logratios/{side}")
            panel.plot(steps, mean, color=colour, label=side)
            panel.fill_between(
                steps, mean - error, mean + error, color=colour, alpha=0.2
            )
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(loss)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    panels[0].set_yscale("symlog", linthresh=1)  # shared: one falls far further
    panels[0].set_ylabel("log-ratio to the reference, nats")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    print(table(rows, losses))


def over_seeds(
    rows: list[dict[str, Any]], loss: str, key: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Steps, and the mean and standard error of a figure over the seeds at each."""
    own = [row for row in rows if row["loss"] == loss]
    steps = sorted({row["step"] for row in own})
    values = [[row[key] for row in own if row["step"] == step] for step in steps]
    mean = np.array([np.mean(some) for some in values])
    error = [np.std(some) / np.sqrt(max(1, len(some) - 1)) for some in values]
    return steps, mean, np.array(error)


def table(rows: list[dict[str, Any]], losses: list[str]) -> str:
    """The ends of the curves, in Markdown."""
    keys = ("logratios/chosen", "logratios/rejected", "rewards/accuracies")
    lines = [
        "| loss | chosen log-ratio | rejected log-ratio | accuracy |",
        "|---" * 4 + "|",
    ]
    for loss in losses:
        cells = [f"`{loss}`"]
        for key in keys:
            _, mean, error = over_seeds(rows, loss, key)
            cells.append(f"{mean[-1]:.3f} ± {error[-1]:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
