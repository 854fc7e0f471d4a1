"""Curves, bars and histograms to SVG that follows the page's colours.

Plots are drawn in placeholder colours that become the page's CSS variables, so that one
SVG serves light, dark and print. The same numbers give the same bytes. This file knows
no run.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpojax.report.reading import Curve

# Placeholders, and what they become.
INK, FAINT = "#010203", "#010204"
SERIES = tuple(f"#0102{number:02x}" for number in range(16, 22))
_VARIABLES = {INK: "--ink", FAINT: "--faint"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpojax",
    "text.parse_math": False,  # a run's name may have dollars
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}
_GAP = 0.1  # between labels, as a share of the height
_MOST_LETTERS = 14  # of a label


class Line(NamedTuple):
    """A curve with the label at its end."""

    label: str
    color: str
    curve: Curve
    dashed: bool = False
    faint: bool = False  # behind the others, and without a label


def lines(
    some: Sequence[Line],
    y_label: str,
    *,
    level: float | None = None,
    from_zero: bool = False,
) -> str:
    """Curves over steps.

    Args:
      some: what to draw; empty curves are left out.
      y_label: of the vertical axis, with its unit.
      level: where a thin line marks what curves are compared with.
      from_zero: whether the vertical axis begins there.
    """

    def draw(axes: Axes) -> None:
        drawn = [line for line in some if len(line.curve[0])]
        if level is not None:
            axes.axhline(level, color=INK, linewidth=0.8, alpha=0.6)
        for line in drawn:
            marker = "o" if len(line.curve[0]) < 12 and not line.faint else None
            axes.plot(
                *line.curve,
                color=line.color,
                linestyle="--" if line.dashed else "-",
                linewidth=1.0 if line.faint else None,
                alpha=0.45 if line.faint else None,
                marker=marker,
                markersize=3.5,
            )
        if from_zero:
            axes.set_ylim(bottom=0)
        _label_ends(axes, [line for line in drawn if not line.faint])
        axes.set(xlabel="step", ylabel=y_label)

    return _svg(draw)


def ridges(rows: Sequence[tuple[str, np.ndarray]], color: str, x_label: str) -> str:
    """Histograms one above the other, the newest in front and at the bottom."""

    def draw(axes: Axes) -> None:
        values = np.concatenate([row for _, row in rows])
        low, high = np.quantile(values, [0.005, 0.995])
        edges = (
            np.linspace(low, high, 41) if high > low else low + np.linspace(-1, 1, 41)
        )
        for place, (label, row) in enumerate(rows):
            base = len(rows) - 1 - place
            counts, _ = np.histogram(row.clip(edges[0], edges[-1]), edges)
            shape = base + 1.5 * counts / max(1, counts.max())
            axes.stairs(
                shape, edges, baseline=base, fill=True, color=color, alpha=0.35,
                zorder=2 + place,
            )  # fmt: skip
            axes.stairs(shape, edges, baseline=base, color=color, zorder=2 + place)
            axes.annotate(
                label, (1.02, base), xycoords=("axes fraction", "data"), va="bottom"
            )
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.6, zorder=20)
        axes.set(xlabel=x_label, yticks=[])
        axes.locator_params(axis="x", nbins=6)
        axes.spines["left"].set_visible(False)

    return _svg(draw)


def dots(x: np.ndarray, y: np.ndarray, color: str, x_label: str, y_label: str) -> str:
    """A point for each pair of numbers, and both zeros."""

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.6)
        axes.plot(x, y, "o", color=color, markersize=3, alpha=0.4, markeredgewidth=0)
        axes.set(xlabel=x_label, ylabel=y_label)

    return _svg(draw)


def bars(
    groups: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[Any]]],
    y_label: str,
) -> str:
    """Shares with their standard errors, groups side by side.

    Args:
      groups: what is compared.
      series: label, colour, and of each group the share and its standard error.
      y_label: of the vertical axis.
    """

    def draw(axes: Axes) -> None:
        width = 0.7 / len(series)
        for number, (_, color, shares) in enumerate(series):
            places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
            means, errors = np.array(shares, float).T
            axes.bar(places, means, 0.88 * width, color=color, alpha=0.85)
            axes.errorbar(places, means, errors, fmt="none", ecolor=INK, elinewidth=1)
            for place, mean, error in zip(places, means, errors, strict=True):
                if np.isfinite(mean):
                    top = mean + np.nan_to_num(error)
                    axes.annotate(
                        f"{100 * mean:.0f} %", (place, top), (0, 2), ha="center",
                        textcoords="offset points", fontsize=8.5,
                    )  # fmt: skip
        axes.axhline(0.5, color=INK, linewidth=0.8, alpha=0.6)
        axes.set_xticks(range(len(groups)), groups)
        axes.set(ylim=(0, 1.12), ylabel=y_label)
        axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axes.grid(visible=False, axis="x")

    return _svg(draw)


def reliability(some: Sequence[tuple[str, str, np.ndarray]]) -> str:
    """Confidence against how often it is right, with the line where both are equal.

    Args:
      some: label, colour, and rows of confidence, share and its standard error.
    """

    def draw(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, alpha=0.6)
        named = []
        for label, color, (confidence, share, error) in some:
            axes.errorbar(
                confidence, share, error, color=color, marker="o", markersize=4,
                linewidth=1.4, elinewidth=0.9,
            )  # fmt: skip
            named.append(Line(label, color, (confidence, share)))
        axes.set(xlim=(0.49, 1.01), ylim=(-0.03, 1.05))
        axes.set(xlabel="confidence sigmoid(|margin|)", ylabel="share that is right")
        _label_ends(axes, named)

    return _svg(draw)


def _label_ends(axes: Axes, some: Sequence[Line]) -> None:
    """Labels right of the curves' ends, moved apart where they would overlap."""
    ends = [line for line in some if line.label and np.isfinite(line.curve[1]).any()]
    low, high = axes.get_ylim()

    def height(line: Line) -> float:
        finite = line.curve[1][np.isfinite(line.curve[1])]
        return float((finite[-1] - low) / (high - low))

    ends.sort(key=height)
    heights = [height(line) for line in ends]
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + _GAP)
    excess = max(0.0, heights[-1] - 1) if heights else 0.0
    for line, top in zip(ends, heights, strict=True):
        # Other letters may be missing in the font by which matplotlib measures.
        text = line.label.encode("ascii", "replace").decode()
        shown = text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 2] + ".."
        axes.annotate(
            shown, (1.02, top - excess), xycoords="axes fraction", color=line.color,
            va="center",
        )  # fmt: skip


def _svg(draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.3, 2.8), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
