"""The samples of run.py as a picture.

Command: python experiments/long_run/plot.py
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from run import Sample, read_samples

_LABELS = {
    "resident_mebibytes": "resident memory, MiB",
    "open_files": "open files",
    "compiled": "compiled programs",
}


def plot(samples: list[Sample], path: Path) -> None:
    """One panel for each figure, over the steps; all begin at zero."""
    figure = Figure(figsize=(8, 7))
    panels = figure.subplots(len(_LABELS), sharex=True)
    steps = [sample.step for sample in samples]
    for panel, (name, label) in zip(panels, _LABELS.items(), strict=True):
        panel.plot(steps, [getattr(sample, name) for sample in samples], linewidth=1)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=Path, default=here / "samples.csv")
    parser.add_argument("--output", type=Path, default=here / "long_run.png")
    settings = parser.parse_args()
    plot(read_samples(settings.samples), settings.output)


if __name__ == "__main__":
    main()
