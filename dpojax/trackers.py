"""Lines of metrics to the services that people watch: TensorBoard, W&B, trackio.

What they are given stands in metrics.jsonl too, which stays the record: a run that is
resumed offers each service every line that it keeps, and the service takes those that
it lacks. A service that fails while a run goes is named once and told nothing more; the
run goes on. How each of them is told is `dpojax.tracker_clients`' concern.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from dpojax.metrics_file import Line
from dpojax.processes import only_first
from dpojax.progress import say
from dpojax.tracker_clients import Opening, TensorBoard, Tracker, Trackio, WandB
from dpojax.whole_files import write_bytes

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_CLIENTS: dict[str, Callable[[Opening], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


class Trackers:
    """The services of a run, until the block that they are opened in is left.

    In all processes but the first they are told nothing.
    """

    def __init__(self, names: Sequence[str]):
        """Only looks whether they are installed.

        Raises:
          ValueError: naming the extra that is missing.
        """
        self._names = tuple(dict.fromkeys(names))
        self._open: dict[str, Tracker] = {}
        self._step, self._row = -1, {}  # a step whose lines are not all there yet
        for name in self._names:
            try:
                version(_PACKAGES[name])  # a directory may have a package's name
            except PackageNotFoundError:
                raise ValueError(
                    f"--track {name} needs a package that is not installed: run "
                    f"pip install 'dpojax[{name}]', or leave {name} out."
                ) from None

    def __enter__(self) -> "Trackers":
        """Nothing is open yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the run everywhere, as one that failed where an error comes by."""
        self.flush()
        self._each(lambda tracker: tracker.close(failed=error is not None))

    @only_first
    def begin(
        self, directory: Path, settings: Mapping[str, Any], lines: Iterable[Line]
    ) -> None:
        """Opens the services and gives them the lines that they lack.

        Args:
          directory: of the run; a file in it keeps the name by which services know it.
          settings: what they show of the configuration.
          lines: those that the run keeps.

        Raises:
          ValueError: if one cannot begin.
        """
        if not self._names:
            return
        opening = Opening(directory, _identity(directory), settings)
        for name in self._names:
            self._open[name] = _CLIENTS[name](opening)
        for line in lines:
            self.write(*line)

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Takes a line; it goes out with the others of its step, as one row."""
        if step != self._step:
            self.flush()
            self._step, self._row = step, {}
        self._row |= {
            f"{split}/{name}": value
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }

    def flush(self) -> None:
        """Sends what was taken; the lines of its step must all have come."""
        row, self._row = self._row, {}
        if row:
            self._each(lambda tracker: tracker.write(self._step, row))

    def _each(self, use: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                use(tracker)
            except tracker.failures as error:
                del self._open[name]
                say(
                    f"Warning: {name} failed ({error!r}) and is told nothing more; "
                    f"metrics.jsonl has everything, and --resume gives {name} what it "
                    "lacks."
                )


def _identity(directory: Path) -> str:
    """The name by which services know a run, made when it is first needed."""
    path = directory / "tracked_as"
    if not path.is_file():
        write_bytes(path, uuid4().hex[:12].encode())
    return path.read_text(encoding="utf-8")
