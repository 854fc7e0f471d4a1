"""Which of a run's figures are drawn, and the sentence above each that says what it is.

A panel without a plot says what is missing and why. This file knows no page and does
not draw.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpojax.report import drawing
from dpojax.report.drawing import SERIES, Line
from dpojax.report.reading import Row, Run, curve, last, spaced

_NUM_BINS = 8  # of confidence, with as many pairs in each
_MOST_DOTS = 400

_NO_EVALUATION = "There is no evaluation yet."
_NO_FIGURES = (
    "There are no figures of single pairs: the run has no held_out.jsonl, since it is "
    "older than that file, has not been evaluated yet, or its loss is not of pairs."
)
_DISPLACED = (
    "Answers that are to be preferred became less likely than under the reference, and "
    "margins grow only since the rejected ones fall further: likelihood displacement. "
    "Where answers like the chosen ones are wanted, try the loss dpop or dpo+sft "
    "(RPO), a lower learning rate or a higher beta."
)


class Panel(NamedTuple):
    """A plot, or what is missing, under a title and a sentence."""

    title: str
    sentence: str
    svg: str = ""


class Pairs(NamedTuple):
    """Held-out pairs at one evaluation."""

    step: int
    margin: np.ndarray
    longer: np.ndarray  # tokens by which the chosen completion is the longer one


def panels(runs: Sequence[Run]) -> list[Panel]:
    """All of them, in the order in which one asks."""
    made = [_loss(runs), _accuracy(runs), _margin(runs), _displacement(runs)]
    pairs = [[_as_pairs(row) for row in run.held_out] for run in runs]
    known = [[one for one in some if one is not None] for some in pairs]
    for number, run in enumerate(runs):
        made.append(_histogram(run, known[number], _color(number)))
    newest = [(run, some[-1]) for run, some in zip(runs, known, strict=True) if some]
    colors = [_color(number) for number, some in enumerate(known) if some]
    made += [_calibration(newest, colors), _by_length(newest, colors)]
    made += [_length(*one, color) for one, color in zip(newest, colors, strict=True)]
    return [*made, _kl(runs), _throughput(runs), _memory(runs)]


def _loss(runs: Sequence[Run]) -> Panel:
    values = _told(runs, "loss")
    sentence = f"Held-out loss {values}; faint: of training." if values else ""
    return _curves("Loss", sentence, runs, "loss", "loss")


def _accuracy(runs: Sequence[Run]) -> Panel:
    values = _told(runs, "rewards/accuracies", percent=True)
    sentence = f"Held-out pairs that are ranked right: {values}." if values else ""
    return _curves(
        "Accuracy",
        sentence,
        runs,
        "rewards/accuracies",
        "share ranked right",
        level=0.5,
    )


def _margin(runs: Sequence[Run]) -> Panel:
    values = _told(runs, "rewards/margins")
    sentence = f"Chosen reward less rejected, held out: {values}." if values else ""
    return _curves("Margin", sentence, runs, "rewards/margins", "margin", level=0)


def _displacement(runs: Sequence[Run]) -> Panel:
    title = "Chosen and rejected log-ratio"
    drawn = []
    for number, run in enumerate(runs):
        for side, dashed in (("chosen", False), ("rejected", True)):
            found = curve(run.test, f"logratios/{side}")
            label = side if len(runs) == 1 else "" if dashed else run.name
            drawn.append(Line(label, _color(number), found, dashed))
    if not any(len(line.curve[0]) for line in drawn):
        why = "No evaluation has a log-ratio: the loss takes no reference, or none yet."
        return Panel(title, why)
    told = [
        f"chosen {last(run.test, 'logratios/chosen'):+.2f}, "
        f"rejected {last(run.test, 'logratios/rejected'):+.2f} nats ({run.name})"
        for run in runs
        if np.isfinite(last(run.test, "logratios/chosen"))
    ]
    fallen = [run.name for run in runs if _has_fallen(run)]
    meaning = f"{', '.join(fallen)}: {_DISPLACED}" if fallen else _not_displaced(runs)
    how = "" if len(runs) == 1 else " (rejected: dashed)"
    sentence = (
        f"Log-probability gained on the reference{how}: {'; '.join(told)}. {meaning}"
    )
    plot = drawing.lines(drawn, "log-ratio (nats)", level=0)
    return Panel(title, sentence, plot)


def _has_fallen(run: Run) -> bool:
    """Whether chosen answers are less likely, by more than two standard errors."""
    error = np.nan_to_num(last(run.test, "logratios/chosen_se"))
    return last(run.test, "logratios/chosen") < -2 * error


def _not_displaced(runs: Sequence[Run]) -> str:
    if all(last(run.test, "logratios/chosen") == 0 for run in runs):
        return "The policy is still the reference."
    return "Chosen answers are no less likely than before: no likelihood displacement."


def _histogram(run: Run, known: Sequence[Pairs], color: str) -> Panel:
    title = f"Margins over time: {run.name}"
    rows = [(f"step {one.step}", one.margin) for one in known if len(one.margin)]
    if not rows:
        return Panel(title, _NO_FIGURES)
    newest = rows[-1][1]
    low, middle, high = np.quantile(newest, [0.1, 0.5, 0.9])
    sentence = (
        f"At the last evaluation the median is {middle:.2f}; eight in ten lie between "
        f"{low:.2f} and {high:.2f}. Left of 0 are pairs that are ranked wrong."
    )
    return Panel(title, sentence, drawing.ridges(rows, color, "margin"))


def _calibration(newest: Sequence[tuple[Run, Pairs]], colors: Sequence[str]) -> Panel:
    title = "Calibration"
    if not newest:
        return Panel(title, _NO_FIGURES)
    found = [(run.name, reliability(pairs.margin)) for run, pairs in newest]
    told = ", ".join(f"{error:.1%} ({name})" for name, (_, error) in found)
    sentence = (
        "sigmoid(margin) is the model's probability that the chosen answer is the "
        "preferred one. Its confidence in the side it prefers, against how often that "
        "is the annotator's; below the line it is too sure. Mean distance from the "
        f"line: {told}."
    )
    drawn = [
        (name, color, bins)
        for (name, (bins, _)), color in zip(found, colors, strict=True)
    ]
    return Panel(title, sentence, drawing.reliability(drawn))


def reliability(margin: np.ndarray) -> tuple[np.ndarray, float]:
    """Confidence, share that is right and its standard error, by bins of confidence.

    Every pair counts by the side that the model prefers: its confidence is
    sigmoid(|margin|), and it is right where the margin is positive; a tie counts one
    half. So nothing depends on which completion of a pair is named first.

    Returns:
      Three rows of numbers, and the mean distance of confidence and share over pairs.
    """
    order = np.argsort(np.abs(margin), kind="stable")
    confidence = 1 / (1 + np.exp(-np.abs(margin[order])))
    right = (1 + np.sign(margin[order])) / 2
    bins, distance = [], 0.0
    for places in np.array_split(np.arange(len(margin)), min(_NUM_BINS, len(margin))):
        share, error = _share(right[places])
        bins.append((confidence[places].mean(), share, error))
        distance += abs(bins[-1][0] - share) * len(places) / len(margin)
    return np.array(bins).T, float(distance)


def _by_length(newest: Sequence[tuple[Run, Pairs]], colors: Sequence[str]) -> Panel:
    title = "Accuracy by length"
    if not newest:
        return Panel(title, _NO_FIGURES)
    series, told = [], []
    for (run, pairs), color in zip(newest, colors, strict=True):
        right = (1 + np.sign(pairs.margin)) / 2
        parts = [right[pairs.longer > 0], right[pairs.longer < 0]]
        shares = [_share(part) for part in parts]
        series.append((run.name, color, shares))
        gap = 100 * (shares[0][0] - shares[1][0])
        if np.isfinite(gap):
            told.append(f"{gap:+.0f} points ({run.name})")
    longer = newest[0][1].longer
    groups = [
        f"chosen {name}\n({np.count_nonzero(count)} pairs)"
        for name, count in (("longer", longer > 0), ("shorter", longer < 0))
    ]
    gaps = ", ".join(told) or "unknown, since one kind is missing"
    sentence = (
        f"Accuracy where the chosen answer is the longer one, less where it is the "
        f"shorter: {gaps}. A large gap says that length is rewarded."
    )
    return Panel(title, sentence, drawing.bars(groups, series, "share ranked right"))


def _length(run: Run, pairs: Pairs, color: str) -> Panel:
    x, y = pairs.longer, pairs.margin
    varies = len(x) > 1 and np.std(x) > 0 and np.std(y) > 0
    told = f"{np.corrcoef(x, y)[0, 1]:+.2f}" if varies else "none, as one is constant"
    sentence = (
        f"Correlation of the margin with how much longer the chosen answer is: {told}."
    )
    places = spaced(range(len(x)), _MOST_DOTS)
    plot = drawing.dots(
        x[places], y[places], color, "chosen less rejected length (tokens)", "margin"
    )
    return Panel(f"Length and margin: {run.name}", sentence, plot)


def _kl(runs: Sequence[Run]) -> Panel:
    title = "KL of samples"
    drawn = _of_test(runs, "samples/kl")
    if not any(len(line.curve[0]) for line in drawn):
        return Panel(
            title,
            "It was not measured: it needs an evaluation with samples, and the "
            "reference's parameters, which precomputed or absent references lack.",
        )
    sentence = (
        f"KL(policy || reference) along the policy's own samples: "
        f"{_told(runs, 'samples/kl')} nats a sequence, over few samples."
    )
    return Panel(title, sentence, drawing.lines(drawn, "KL (nats a sequence)", level=0))


def _throughput(runs: Sequence[Run]) -> Panel:
    speeds = [curve(run.train, "tokens_per_second") for run in runs]
    told = ", ".join(
        f"{np.median(speed[1]):,.0f} ({run.name})"
        for run, speed in zip(runs, speeds, strict=True)
        if len(speed[1])
    )
    sentence = f"Median tokens a second, without padding: {told}." if told else ""
    return _of_training("Throughput", sentence, runs, "tokens_per_second", "tokens/s")


def _memory(runs: Sequence[Run]) -> Panel:
    told = ", ".join(
        f"{last(run.train, 'memory_gib'):.2f} GiB ({run.name})"
        for run in runs
        if np.isfinite(last(run.train, "memory_gib"))
    )
    sentence = f"Peak so far of the fullest device, or of the process: {told}."
    return _of_training(
        "Memory", sentence if told else "", runs, "memory_gib", "peak (GiB)"
    )


def _curves(
    title: str,
    sentence: str,
    runs: Sequence[Run],
    metric: str,
    y_label: str,
    level: float | None = None,
) -> Panel:
    """A metric of training, faint, and of evaluations."""
    drawn = [
        Line("", _color(number), curve(run.train, metric), faint=True)
        for number, run in enumerate(runs)
    ]
    drawn += _of_test(runs, metric)
    if not any(len(line.curve[0]) for line in drawn):
        return Panel(title, f"No line has {metric}: {_why_absent(runs)}")
    plot = drawing.lines(drawn, y_label, level=level)
    return Panel(title, sentence or _NO_EVALUATION, plot)


def _of_training(
    title: str, sentence: str, runs: Sequence[Run], metric: str, y_label: str
) -> Panel:
    drawn = [
        Line(run.name, _color(number), curve(run.train, metric))
        for number, run in enumerate(runs)
    ]
    if not any(len(line.curve[0]) for line in drawn):
        why = "no step was logged yet, or the run is older than this metric."
        return Panel(title, f"No line has {metric}: {why}")
    return Panel(title, sentence, drawing.lines(drawn, y_label, from_zero=True))


def _of_test(runs: Sequence[Run], metric: str) -> list[Line]:
    return [
        Line(run.name, _color(number), curve(run.test, metric))
        for number, run in enumerate(runs)
    ]


def _why_absent(runs: Sequence[Run]) -> str:
    if any(run.test or run.train for run in runs):
        return "the loss does not give it."
    return "the run has just begun."


def _told(runs: Sequence[Run], metric: str, percent: bool = False) -> str:
    """The newest held-out value of every run, with its standard error."""
    told = []
    for run in runs:
        value, error = last(run.test, metric), last(run.test, metric + "_se")
        if not np.isfinite(value):
            continue
        scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
        shown = f"{scale * value:.{digits}f}"
        if np.isfinite(error):
            shown += f" ± {scale * error:.{digits}f}"
        told.append(f"{shown}{unit} ({run.name})")
    return ", ".join(told)


def _as_pairs(row: Row) -> Pairs | None:
    """Pairs of an evaluation whose numbers are all finite; None of other losses."""
    names = ("chosen_reward", "rejected_reward", "chosen_length", "rejected_length")
    if not all(isinstance(row.get(name), list) for name in names):
        return None
    arrays = np.array([row[name] for name in names], float)
    chosen, rejected, *lengths = arrays[:, np.isfinite(arrays).all(0)]
    if not len(chosen):
        return None
    return Pairs(row["step"], chosen - rejected, lengths[0] - lengths[1])


def _share(right: np.ndarray) -> tuple[float, float]:
    """A mean and its standard error; not numbers where there is nothing."""
    if not len(right):
        return np.nan, np.nan
    error = right.std() / np.sqrt(len(right) - 1) if len(right) > 1 else np.nan
    return float(right.mean()), float(error)


def _color(number: int) -> str:
    return SERIES[number % len(SERIES)]
