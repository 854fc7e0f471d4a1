"""What a person sees while waiting: live bars on a terminal, calm lines elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

CONSOLE = Console(highlight=False, emoji=False)


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, figures: str, units: int = 1) -> None:
        """By so many units, with figures to show."""
        ...


@contextmanager
def track(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A progress bar, and what moves it on: by default by one unit at each call."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    bars = Progress(
        *columns,
        console=CONSOLE,
        disable=CONSOLE.quiet or not CONSOLE.is_terminal,
        transient=True,
    )
    with bars:
        task = bars.add_task(description, total=total, completed=done, figures="")

        def advance(figures: str, units: int = 1) -> None:
            bars.update(task, advance=units, figures=figures)

        yield advance


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
