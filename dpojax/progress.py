"""What a person sees while waiting: live bars on a terminal, calm lines elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

CONSOLE = Console(highlight=False, emoji=False)

# Seconds between two lines of what has no bar, and before the first.
CALM = 30.0


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, figures: str, units: int = 1) -> None:
        """By so many units, with figures to show."""
        ...


@contextmanager
def track(
    description: str, total: int, done: int = 0, *, lines: bool = True
) -> Iterator[Advance]:
    """A progress bar, and what moves it on: by default by one unit at each call.

    Args:
      description: what is done.
      total: its units.
      done: those that were done before.
      lines: whether a line is said from time to time where there is no terminal.
    """
    if not CONSOLE.is_terminal:
        yield _make_calm(description, total, done) if lines else _nothing
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(
        *columns, console=CONSOLE, disable=CONSOLE.quiet, transient=True
    ) as bars:
        task = bars.add_task(description, total=total, completed=done, figures="")

        def advance(figures: str, units: int = 1) -> None:
            bars.update(task, advance=units, figures=figures)

        yield advance


def _make_calm(description: str, total: int, done: int) -> Advance:
    """Says how far it is, and no more often than is calm."""
    start = last = time.monotonic()
    begun_at, count = done, done

    def advance(figures: str, units: int = 1) -> None:
        nonlocal last, count
        count, now = count + units, time.monotonic()
        if now - last >= CALM and count < total:
            last = now
            left = (now - start) / (count - begun_at) * (total - count)
            say(f"{description}: {count:,} of {total:,}, left {duration(left)}")

    return advance


def _nothing(figures: str, units: int = 1) -> None:
    """Where others say how far it is."""


@contextmanager
def busy(description: str) -> Iterator[None]:
    """Shows that something goes on of which nobody knows how long it takes.

    Where there is no terminal, only once it takes long, and then at its end.
    """
    if CONSOLE.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(
            *columns, console=CONSOLE, disable=CONSOLE.quiet, transient=True
        ) as bars:
            bars.add_task(description, total=None)
            yield
        return
    start, long = time.monotonic(), threading.Timer(CALM, say, [f"{description} …"])
    long.daemon = True
    long.start()
    try:
        yield
    finally:
        long.cancel()
    seconds = time.monotonic() - start
    if seconds >= CALM:
        say(f"{description} took {duration(seconds)}.")


def make_first_times() -> Callable[[str], AbstractContextManager[None]]:
    """`busy`, the first time with each description; afterwards nothing is shown."""
    known: set[str] = set()

    def first_time(description: str) -> AbstractContextManager[None]:
        if description in known:
            return nullcontext()
        known.add(description)
        return busy(description)

    return first_time


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def be_quiet() -> None:
    """From now on nothing is shown: another process shows the same."""
    CONSOLE.quiet = True


def say(text: str) -> None:
    """A line, its brackets meant literally."""
    CONSOLE.print(escape(text), soft_wrap=True)


def say_part(text: str) -> None:
    """Text as it is, the line left open."""
    CONSOLE.out(text, end="", highlight=False)


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A table whose first column names its rows."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    CONSOLE.print(table)


def show_completions(
    prompts: Sequence[str], completions: Mapping[str, Sequence[str]]
) -> None:
    """Prompts, each with its completions under their names."""
    for number, prompt in enumerate(prompts):
        CONSOLE.print(f"\n[bold]{escape(prompt)}[/bold]", soft_wrap=True)
        for name, texts in completions.items():
            text = escape(texts[number])
            CONSOLE.print(f"  [dim]{name}:[/dim] {text}", soft_wrap=True)
