"""TensorBoard, Weights & Biases and trackio, each as something that takes rows.

Each is an extra of the package, imported where it is opened and nowhere else. What it
is told of a run, and when, is `dpojax.trackers`' concern.
"""

import json
import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Row = Mapping[str, float]  # by the names that a service shows


class Opening(NamedTuple):
    """What a service is told of a run before its first row."""

    directory: Path  # of the run
    identity: str  # the same when the run is resumed, and no other run's
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What people call the run."""
        return self.directory.resolve().name


class Tracker(Protocol):
    """An open service. Each step comes once, in order, with all that belongs to it."""

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What it raises where it cannot go on."""
        ...

    def write(self, step: int, row: Row) -> None:
        """Takes a row, unless it has one of this step or a later one."""
        ...

    def close(self, failed: bool) -> None:
        """Says that the run has ended, and how; waits for what is on its way."""
        ...


class TensorBoard:
    """Event files in the run's directory, written anew by a resumed run.

    Not by tensorboardX's SummaryWriter: its thread dies unseen where a disk is full,
    and then whoever gives it an eleventh event waits for ever.
    """

    failures = (OSError,)

    def __init__(self, opening: Opening):
        """Begins a file in place of what there is."""
        directory = opening.directory / "tensorboard"
        directory.mkdir(exist_ok=True)
        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
        self._event = import_module("tensorboardX.proto.event_pb2").Event
        self._summary = import_module("tensorboardX.proto.summary_pb2").Summary
        files = import_module("tensorboardX.event_file_writer")
        self._file = files.EventsWriter(str(directory / "events"))
        as_text = import_module("tensorboardX.summary").text
        settings = json.dumps(opening.settings, indent=2, ensure_ascii=False)
        indented = settings.replace("\n", "\n    ")  # Markdown's code
        self._add(0, as_text("configuration", f"    {indented}"))

    def write(self, step: int, row: Row) -> None:
        """Adds an event, which a page that is open shows at once."""
        value = self._summary.Value
        values = [value(tag=name, simple_value=number) for name, number in row.items()]
        self._add(step, self._summary(value=values))

    def close(self, failed: bool) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, step: int, summary: Any) -> None:
        event = self._event(step=step, wall_time=time.time(), summary=summary)
        self._file.write_event(event)
        self._file.flush()


class WandB:
    """A run of Weights & Biases; its variables (WANDB_PROJECT, WANDB_MODE, …) hold."""

    def __init__(self, opening: Opening):
        """Begins the run of this name, or goes on with it.

        Raises:
          ValueError: if the service refuses.
        """
        wandb = import_module("wandb")
        self.failures = (wandb.Error, OSError)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dpojax"),
                dir=str(opening.directory),
                id=opening.identity,
                name=opening.name,
                resume="allow",
                config=dict(opening.settings),
                allow_val_change=True,  # in a run that is resumed
                settings=wandb.Settings(console="off"),  # bars are no record
            )
            self._next = self._run.step
        except self.failures as error:
            raise ValueError(_refusal("wandb", error)) from error

    def write(self, step: int, row: Row) -> None:
        """Adds a row; the service would drop an earlier one with a warning."""
        if step >= self._next:
            self._run.log(dict(row), step=step, commit=True)

    def close(self, failed: bool) -> None:
        """Ends the run; waits until it is sent."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, in its own database; its variables (TRACKIO_DIR, …) hold."""

    failures = (OSError,)  # of others it warns by itself, and goes on

    def __init__(self, opening: Opening):
        """Begins the run of this name, or goes on with it.

        Raises:
          ValueError: if it cannot.
        """
        self._trackio = import_module("trackio")
        try:
            run = self._trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "dpojax"),
                name=f"{opening.name}-{opening.identity}",
                config=dict(opening.settings),
                resume="allow",
                embed=False,  # no page in a notebook
            )
        except (ValueError, OSError) as error:
            raise ValueError(_refusal("trackio", error)) from error
        self._next = run._next_step  # it has no public name for it

    def write(self, step: int, row: Row) -> None:
        """Adds a row; trackio would keep a second one of a step."""
        if step >= self._next:
            self._trackio.log(dict(row), step=step)

    def close(self, failed: bool) -> None:
        """Ends the run; waits until it is written."""
        self._trackio.finish()


def _refusal(name: str, error: Exception) -> str:
    return (
        f"--track {name} could not begin ({error}); mend that, or leave {name} out, "
        "and continue the run with --resume."
    )
