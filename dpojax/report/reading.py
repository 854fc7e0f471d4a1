"""A run's directory to lists of numbers and texts, whether the run has ended or not.

Files of a run that goes on may end within a line, older runs lack some of them, and
numbers may be null: what is missing is empty here. A configuration is read, never run.
This file knows no page.
"""

import ast
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

Row = dict[str, Any]
Curve = tuple[np.ndarray, np.ndarray]  # steps and values
Item = TypeVar("Item")

MOST_POINTS = 2_000  # of a curve: more than a plot has pixels
MOST_EVALUATIONS = 6  # whose examples and samples are shown


class Run(NamedTuple):
    """What is known of a run."""

    name: str
    settings: dict[str, str]  # by field, those within others as ``loss.name``
    train: list[Row]
    test: list[Row]
    held_out: list[Row]  # of some evaluations, the first and the last included
    samples: list[Row]
    warnings: list[Row]


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads run directories; each gets the shortest name that tells it from the others.

    Raises:
      ValueError: if one is no run.
    """
    directories = [Path(path) for path in paths]
    names = _names(directories)
    return [_read(path, name) for path, name in zip(directories, names, strict=True)]


def curve(rows: Sequence[Row], name: str) -> Curve:
    """A metric over steps, thinned; empty where no row has it."""
    known = [
        (row["step"], row[name])
        for row in rows
        if isinstance(row.get(name), int | float)
    ]
    thinned = spaced(known, MOST_POINTS)
    steps, values = zip(*thinned, strict=True) if thinned else ((), ())
    return np.array(steps, float), np.array(values, float)


def last(rows: Sequence[Row], name: str) -> float:
    """The newest value of a metric; not a number where there is none."""
    values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
    return float(values[-1]) if values else math.nan


def spaced(items: Sequence[Item], count: int) -> list[Item]:
    """So many of them at most, evenly, with the first and the last."""
    if len(items) <= count:
        return list(items)
    places = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[place] for place in places]


def _read(directory: Path, name: str) -> Run:
    if not (directory / "metrics.jsonl").is_file():
        raise ValueError(
            f"{directory} is no run: it has no metrics.jsonl; give directories that "
            "dpojax train has written."
        )
    rows = [row for row in _rows(_lines(directory / "metrics.jsonl")) if "split" in row]
    return Run(
        name,
        _settings(directory / "config.py"),
        [row for row in rows if row["split"] == "train"],
        [row for row in rows if row["split"] == "test"],
        _rows(spaced(_lines(directory / "held_out.jsonl"), MOST_EVALUATIONS)),
        [row for row in _rows(_lines(directory / "samples.jsonl")) if "prompt" in row],
        _rows(_lines(directory / "warnings.jsonl")),
    )


def _names(directories: Sequence[Path]) -> list[str]:
    """Last parts of paths, or whole paths where these are alike."""
    names = [path.resolve().name for path in directories]
    if len(set(names)) == len(names):
        return names
    return [str(path) for path in directories]


def _lines(path: Path) -> list[str]:
    """Whole lines: what follows the last line's end is still being written."""
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _rows(lines: Iterable[str]) -> list[Row]:
    """Objects with a step; a line that is none of these is left out."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _settings(path: Path) -> dict[str, str]:
    """The keywords of the call that ``config()`` returns, as they are written there."""
    if not path.is_file():
        return {}
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return {}
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    calls = [value for value in returned if isinstance(value, ast.Call)]
    return dict(_flat(calls[0], "")) if calls else {}


def _flat(call: ast.Call, prefix: str) -> Iterable[tuple[str, str]]:
    for keyword in call.keywords:
        name = f"{prefix}{keyword.arg}"
        if isinstance(keyword.value, ast.Call) and keyword.value.keywords:
            yield from _flat(keyword.value, f"{name}.")
        else:
            yield name, ast.unparse(keyword.value)
