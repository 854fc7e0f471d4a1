"""How far the runs of a sweep have come, by what their directories hold.

This file knows no model.
"""

from collections.abc import Sequence
from pathlib import Path

from dpojax.checkpoint import check_whole, set_aside, steps_in
from dpojax.progress import say
from dpojax.resume import find_step
from dpojax.run_directory import has_begun
from dpojax.whole_files import write_bytes

_DIVERGED = Path("nan", "ended.txt")


def has_diverged(directory: Path) -> bool:
    """Whether a step that was not finite ended the run."""
    return (directory / _DIVERGED).is_file()


def mark_diverged(directory: Path, sentence: str) -> None:
    """Says so, for people and for a sweep that is resumed."""
    (directory / _DIVERGED).parent.mkdir(exist_ok=True)
    write_bytes(directory / _DIVERGED, f"{sentence}\n".encode())


def is_finished(directory: Path) -> bool:
    """Whether the run has its last step behind it."""
    return (directory / "final").is_dir()


def newest_step(directory: Path) -> int:
    """The step of a run's newest whole checkpoint, or 0."""
    return find_step(directory / "checkpoints") if has_begun(directory) else 0


def go_back_to(step: int, directories: Sequence[Path]) -> None:
    """Sets aside what is newer: its runs go on from here together.

    Raises:
      ValueError: if a run has no whole checkpoint of that step.
    """
    for directory in directories:
        checkpoints = directory / "checkpoints"
        later = [other for other in steps_in(checkpoints) if other > step]
        if step and later:
            check_whole(checkpoints, step)
        if later:
            aside = set_aside(checkpoints, later)
            say(f"Not all runs came as far: newer checkpoints are now in {aside}.")
