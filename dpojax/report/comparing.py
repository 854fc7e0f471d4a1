"""Combinations of settings that a sweep tried, over their seeds, and which to choose.

The rule: the best is the highest mean held-out accuracy; of those within one standard
error of it, the one whose samples are the nearest to the reference is chosen, since
what more was moved bought nothing that can be told from chance. The standard error is
that between seeds or, of one seed, that of the held-out examples. This file knows no
page.

References:
  Breiman, Friedman, Olshen and Stone, Classification and Regression Trees, 1984,
  section 3.4.3 (the rule of one standard error).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from dpojax.report.reading import Run, last
from dpojax.sweep_list import read_list

_CONFIDENCE = 0.95
_ACCURACY, _MARGIN, _KL = "rewards/accuracies", "rewards/margins", "samples/kl"


class Estimate(NamedTuple):
    """A mean over seeds."""

    mean: float
    error: float  # its standard error; no number where nothing tells
    half_width: float  # of its 95 % t interval over seeds; no number for one seed


class Listed(NamedTuple):
    """The runs that a path stands for."""

    path: str
    directories: list[str]
    changes: list[dict[str, str]]  # how each differs from the others; of a sweep only


class Combination(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    runs: list[str]
    step: int  # the last evaluation's, of the run that is the least far
    accuracy: Estimate
    margin: Estimate
    kl: Estimate
    is_on_frontier: bool = False  # none has a higher accuracy at a smaller KL


def runs_at(path: str) -> Listed:
    """The run directories of a sweep that have begun; of anything else, itself."""
    listed = read_list(Path(path))
    if listed is None:
        return Listed(path, [path], [])
    every = [(Path(path) / str(n), changes) for n, changes in enumerate(listed.runs)]
    begun = [(run, some) for run, some in every if (run / "metrics.jsonl").is_file()]
    return Listed(path, [str(run) for run, _ in begun], [some for _, some in begun])


def combinations(listed: Listed, runs: Sequence[Run]) -> list[Combination]:
    """What a sweep tried, the highest accuracy first; nothing where it is none.

    Args:
      listed: the runs that have begun.
      runs: these, as they were read, in their order.
    """
    if not listed.changes:
        return []
    by_name: dict[str, list[Run]] = {}
    for changes, run in zip(listed.changes, runs, strict=True):
        told = [f"{k} {value}" for k, value in changes.items() if k != "seed"]
        by_name.setdefault(", ".join(told) or "as given", []).append(run)
    found = [_combination(name, some) for name, some in by_name.items()]
    found.sort(key=lambda one: _or_least(one.accuracy.mean), reverse=True)
    return [one._replace(is_on_frontier=_leads(one, found)) for one in found]


def choose(tried: Sequence[Combination]) -> tuple[Combination | None, str]:
    """The combination that the rule takes, and a sentence that says why."""
    known = [one for one in tried if math.isfinite(one.accuracy.mean)]
    if not known:
        return None, "None can be chosen: no run has a held-out accuracy."
    furthest = max(one.step for one in known)
    whole = [one for one in known if one.step == furthest]
    best = max(whole, key=lambda one: one.accuracy.mean)
    error = best.accuracy.error if math.isfinite(best.accuracy.error) else 0.0
    least = best.accuracy.mean - error
    near = [one for one in whole if one.accuracy.mean >= least]
    chosen = min(near, key=lambda one: _or_most(one.kl.mean))
    reason = "it is the nearest to the reference."
    if not math.isfinite(chosen.kl.mean):
        reason = "it is the highest; without samples, nothing tells their KL."
    return chosen, (
        f"Choose {chosen.name}: of those at step {furthest} whose accuracy is within "
        f"one standard error ({error:.1%}) of the highest, {best.accuracy.mean:.1%}, "
        f"{reason}"
    )


def _combination(name: str, runs: Sequence[Run]) -> Combination:
    steps = [max((row["step"] for row in run.test), default=0) for run in runs]
    names = [run.name for run in runs]
    accuracy, margin, kl = (_estimate(runs, name) for name in (_ACCURACY, _MARGIN, _KL))
    return Combination(name, names, min(steps), accuracy, margin, kl)


def _estimate(runs: Sequence[Run], metric: str) -> Estimate:
    values = np.array([last(run.test, metric) for run in runs])
    number = len(values)
    if number == 1:
        return Estimate(values[0], last(runs[0].test, f"{metric}_se"), math.nan)
    error = values.std(ddof=1) / math.sqrt(number)
    reach = stats.t.ppf((1 + _CONFIDENCE) / 2, number - 1)
    return Estimate(float(values.mean()), float(error), float(reach * error))


def _leads(one: Combination, every: Sequence[Combination]) -> bool:
    return math.isfinite(one.kl.mean) and not any(
        other.accuracy.mean > one.accuracy.mean and other.kl.mean < one.kl.mean
        for other in every
    )


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _or_most(value: float) -> float:
    return value if math.isfinite(value) else math.inf
