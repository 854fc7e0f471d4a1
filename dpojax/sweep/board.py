"""The runs of a sweep side by side: a live table on a terminal, calm lines elsewhere.

This file knows no model and no loop.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dpojax.progress import CONSOLE, say
from dpojax.sweep.grouping import Trial

_TRAIN = (("loss", "loss"),)
_TEST = (
    ("held-out accuracy", "rewards/accuracies"),
    ("margin", "rewards/margins"),
    ("KL (nats)", "samples/kl"),
)


class Board:
    """What is known of each run; entered, it is shown."""

    def __init__(self, trials: Sequence[Trial]):
        """All of them wait."""
        self._trials = {trial.number: trial for trial in trials}
        self._standing = dict.fromkeys(self._trials, "waiting")
        self._train: dict[int, Mapping[str, float]] = {}
        self._test: dict[int, Mapping[str, float]] = {}
        self._is_live = CONSOLE.is_terminal and not CONSOLE.quiet
        self._live: Any = nullcontext()
        if self._is_live:
            self._live = Live(
                get_renderable=self.table, console=CONSOLE, refresh_per_second=4
            )

    def __enter__(self) -> "Board":
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)
        if not self._is_live:
            CONSOLE.print(self.table())

    def show(
        self,
        number: int,
        standing: str,
        train: Mapping[str, float] | None = None,
        test: Mapping[str, float] | None = None,
    ) -> None:
        """Replaces what is known of a run; what is not given stays."""
        self._standing[number] = standing
        self._train[number] = train or self._train.get(number, {})
        self._test[number] = test or self._test.get(number, {})

    def teller(self, number: int) -> Callable[[str], None]:
        """Shows a run's lines where no table does."""

        def tell(line: str) -> None:
            if not self._is_live:
                say(f"run {number}  {line}")

        return tell

    def table(self) -> Table:
        """A row for each run."""
        names = list(dict.fromkeys(n for t in self._trials.values() for n in t.changes))
        table = Table()
        figures = [title for title, _ in _TRAIN + _TEST]
        for title in ("run", *names, "standing", *figures):
            table.add_column(escape(title), justify="right", overflow="fold")
        for number, trial in self._trials.items():
            changes = [trial.changes.get(name, "") for name in names]
            shown = [_figure(self._train.get(number, {}), name) for _, name in _TRAIN]
            shown += [_figure(self._test.get(number, {}), name) for _, name in _TEST]
            cells = (str(number), *changes, self._standing[number], *shown)
            table.add_row(*map(escape, cells))
        return table


def _figure(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.4g}" if name in values else "–"
