"""What a run measured, a JSON object a line, in the order of steps.

    metrics.jsonl   means, of training and of the held-out examples
    held_out.jsonl  of each evaluation, the figures of the first held-out examples

This file does not know what is measured.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpojax.processes import only_first
from dpojax.whole_files import naming, reach_disk, write_bytes

Line = tuple[int, str, dict[str, float | None]]  # step, split, values


class MetricsFile:
    """Lines of metrics. Process 0 writes them; in the others its methods do nothing."""

    def __init__(self, path: Path, keep_until: int):
        """Opens the file; lines after that step are dropped, since they come again."""
        self.path = path
        self._forget(keep_until)

    @only_first
    def _forget(self, keep_until: int) -> None:
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = text.split("\n")[:-1]  # a line cut short by a crash has no end
        kept = [line for line in lines if json.loads(line)["step"] <= keep_until]
        write_bytes(self.path, "".join(line + "\n" for line in kept).encode())

    @only_first
    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends a line; numbers that are not finite become null."""
        finite = {k: v if np.isfinite(v) else None for k, v in values.items()}
        self._append({"step": step, "split": split} | finite)

    @only_first
    def write_each(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        """Appends a line of lists, to six digits; nothing where there are none."""
        rounded = {name: [_rounded(x) for x in some] for name, some in values.items()}
        if rounded:
            self._append({"step": step} | rounded)

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def lines(self) -> Iterator[Line]:
        """Every line that is there, as `write` was given it."""
        return read_lines(self.path)

    @only_first
    def keep(self) -> None:
        """Returns when all lines would survive the machine's sudden end too."""
        with self.path.open("a", encoding="utf-8") as file:
            reach_disk(file)


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of metrics of a file, which need not be there."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        values = json.loads(line)
        yield values.pop("step"), values.pop("split"), values


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
