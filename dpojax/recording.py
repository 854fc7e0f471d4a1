"""What a run records: lines of metrics, and the warnings that they give.

    metrics.jsonl   see `dpojax.metrics_file`
    warnings.jsonl  {"step", "kind", "text"}, each kind once

The second is a function of the first: a resumed run writes it anew from the lines that
it keeps. Lines go to trackers too. This file does not know what is measured.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpojax.advice import Adviser
from dpojax.metrics_file import MetricsFile
from dpojax.processes import is_first
from dpojax.progress import say
from dpojax.trackers import Trackers
from dpojax.whole_files import write_json_lines


class Recording:
    """Takes each line of metrics once. In all processes but the first only looks on."""

    def __init__(
        self,
        directory: Path,
        keep_until: int,
        adviser: Adviser,
        trackers: Trackers,
        settings: Mapping[str, Any],
        tell: Callable[[str], None] = say,
    ):
        """Opens the files; what is after that step is dropped, since it comes again.

        Args:
          directory: of the run.
          keep_until: that step.
          adviser: finds the warnings.
          trackers: services that are not open yet.
          settings: what these show of the configuration.
          tell: shows them.
        """
        self._tell = tell
        self._file = MetricsFile(directory / "metrics.jsonl", keep_until=keep_until)
        self._path = directory / "warnings.jsonl"
        self._adviser = adviser
        self._trackers = trackers
        kept = list(self._file.lines()) if is_first() else []
        self._warnings = [advice for line in kept for advice in adviser.read(*line)]
        trackers.begin(directory, settings, kept)
        self._write_warnings()

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds a line; says what it is the first to show."""
        self._file.write(step, split, values)
        if not is_first():
            return
        self._trackers.write(step, split, values)
        new = self._adviser.read(step, split, values)
        for advice in new:
            self._tell(f"Warning at step {step}: {advice.text}")
        if new:
            self._warnings += new
            self._write_warnings()

    def keep(self) -> None:
        """Returns when all lines would survive the machine's sudden end too."""
        self._trackers.flush()
        self._file.keep()

    def _write_warnings(self) -> None:
        write_json_lines(self._path, [one._asdict() for one in self._warnings])
