"""Runs as one HTML file that needs nothing else: no script, no network, no other file.

Everything that models, data, paths and settings say is escaped. This file knows no
plot.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from dpojax.command_config import ReportConfig
from dpojax.progress import say
from dpojax.report.comparing import (
    Estimate,
    Listed,
    choose,
    combinations,
    runs_at,
)
from dpojax.report.panels import panels
from dpojax.report.reading import MOST_EVALUATIONS, Run, last, read_runs, spaced
from dpojax.whole_files import write_bytes

_MOST_PROMPTS = 16
_MOST_LETTERS = 2_000  # of a text; with the bounds of panels, a page of a few MB
_COLUMNS = (
    ("held-out loss", "loss", "{:.4f}"),
    ("accuracy", "rewards/accuracies", "{:.1%}"),
    ("margin", "rewards/margins", "{:.3f}"),
    ("KL (nats)", "samples/kl", "{:.2f}"),
)


class Sample(NamedTuple):
    """What a run wrote at a step."""

    step: int
    text: str


class Prompt(NamedTuple):
    """A prompt and its continuations, by run."""

    text: str
    columns: list[tuple[str, list[Sample]]]


def report(config: ReportConfig) -> Path:
    """Writes the page of some runs, in place of an older one."""
    output = Path(config.output or Path(config.runs[0]) / "report.html")
    listed = [runs_at(path) for path in config.runs]
    text = page(listed)
    write_bytes(output, text.encode())
    num_runs = sum(len(each.directories) for each in listed)
    say(f"{output}: {num_runs} run(s), {len(text) / 1e6:.1f} MB")
    return output


def page(listed: Sequence[Listed], refresh: int | None = None) -> str:
    """The page of some runs.

    Args:
      listed: of run directories, or of sweeps, which stand for their runs.
      refresh: seconds after which a browser asks again; None: never.

    Raises:
      ValueError: if a directory is no run, or of sweeps no run has begun.
    """
    directories = [run for each in listed for run in each.directories]
    if not directories:
        paths = ", ".join(each.path for each in listed)
        raise ValueError(f"None of the runs of {paths} has begun; wait.")
    runs = read_runs(directories)
    loader = jinja2.PackageLoader("dpojax.report", "")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(
        title=" · ".join(run.name for run in runs),
        refresh=refresh,
        columns=[title for title, _, _ in _COLUMNS],
        runs=[_overview(run, number) for number, run in enumerate(runs)],
        warnings=[(run.name, row) for run in runs for row in run.warnings],
        comparisons=_comparisons(listed, runs),
        panels=panels(runs),
        names=[run.name for run in runs],
        differences=_differences(runs),
        settings=[(run.name, run.settings) for run in runs],
        prompts=_prompts(runs),
    )


def _overview(run: Run, number: int) -> dict[str, Any]:
    steps = [row["step"] for row in run.train + run.test]
    values = [(last(run.test, metric), form) for _, metric, form in _COLUMNS]
    return {
        "name": run.name,
        "series": number % 6,
        "loss": run.settings.get("loss.name", "").strip("'\""),
        "step": max(steps, default=0),
        "values": [form.format(x) if np.isfinite(x) else "–" for x, form in values],
    }


def _comparisons(listed: Sequence[Listed], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each sweep among them, a table of what it tried and a choice."""
    found, rest = [], list(runs)
    for each in listed:
        count = len(each.directories)
        own, rest = rest[:count], rest[count:]
        tried = combinations(each, own)
        if tried:
            chosen, sentence = choose(tried)
            rows = [
                {
                    "name": one.name,
                    "runs": ", ".join(one.runs),
                    "step": one.step,
                    "values": [
                        _interval(one.accuracy, "{:.1%}"),
                        _interval(one.margin, "{:.3f}"),
                        _interval(one.kl, "{:.2f}"),
                    ],
                    "is_on_frontier": one.is_on_frontier,
                    "is_chosen": one is chosen,
                }
                for one in tried
            ]
            found.append({"path": each.path, "rows": rows, "sentence": sentence})
    return found


def _interval(estimate: Estimate, form: str) -> str:
    """A mean with its interval, where seeds tell one."""
    mean, _, half_width = estimate
    if not np.isfinite(mean):
        return "–"
    told = form.format(mean)
    return f"{told} ± {form.format(half_width)}" if np.isfinite(half_width) else told


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, by field."""
    fields = dict.fromkeys(field for run in runs for field in run.settings)
    rows = [(field, [run.settings.get(field, "–") for run in runs]) for field in fields]
    return [(field, values) for field, values in rows if len(set(values)) > 1]


def _prompts(runs: Sequence[Run]) -> list[Prompt]:
    """Prompts in the order of the files, with continuations of some evaluations."""
    texts = dict.fromkeys(str(row["prompt"]) for run in runs for row in run.samples)
    found = []
    for text in spaced(list(texts), _MOST_PROMPTS):
        columns = []
        for run in runs:
            own = [row for row in run.samples if row["prompt"] == text]
            steps = {row["step"]: str(row.get("completion", "")) for row in own}
            some = spaced(list(steps.items()), MOST_EVALUATIONS)
            columns.append(
                (run.name, [Sample(step, _cut(said)) for step, said in some])
            )
        found.append(Prompt(_cut(text), columns))
    return found


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else text[:_MOST_LETTERS] + " […]"
