"""What is shown while waiting: on a terminal, and where there is none."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from dpojax import progress
from dpojax.progress import busy, duration, make_first_times, track


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written where there is no terminal."""
    return write_to(monkeypatch, is_terminal=False)


def write_to(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=100)
    monkeypatch.setattr(progress, "CONSOLE", console)
    return written


def set_clock(monkeypatch: pytest.MonkeyPatch, times: Iterator[float]) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))


def test_by_hand_long_work_says_how_far_it_is_every_thirty_seconds(
    shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    """After 50 of 400, 100 take 40 s; so the 250 that are left take 100 s."""
    set_clock(monkeypatch, iter([0.0, 10.0, 40.0, 60.0, 80.0]))
    with track("Preparing", total=400, done=50) as advance:
        for units in (50, 50, 50, 200):
            advance("", units)
    assert shown.getvalue() == "Preparing: 150 of 400, left 0:01:40\n"


def test_short_work_and_work_that_others_tell_of_says_nothing(
    shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    with track("Preparing", total=3) as advance, busy("Saving"):
        for _ in range(3):
            advance("")
    set_clock(monkeypatch, iter([0.0, 40.0, 80.0]))
    with track("Training", total=3, lines=False) as advance:
        advance("")
    assert shown.getvalue() == ""


def test_what_takes_long_is_named_while_it_goes_on_and_at_its_end(
    shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "CALM", 0.0)
    with busy("Compiling"):
        while not shown.getvalue():
            pass
    assert shown.getvalue().splitlines() == ["Compiling …", "Compiling took 0:00:00."]


def test_a_terminal_shows_bars_within_bars_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    written = write_to(monkeypatch, is_terminal=True)
    with track("Training", total=2, lines=False) as advance:
        with busy("Compiling"):
            advance("loss 0.5")
        with track("Evaluating", total=1) as inner:
            inner("")
        advance("")
    text = written.getvalue()
    for part in ("Training", "Compiling", "Evaluating", "loss 0.5"):
        assert part in text
    assert text.endswith("\x1b[2K") or text.rstrip().endswith("\x1b[?25h\x1b[1A\x1b[2K")


def test_each_wait_is_shown_the_first_time(monkeypatch: pytest.MonkeyPatch):
    begun: list[str] = []
    monkeypatch.setattr(progress, "busy", lambda text: begun.append(text) or busy(text))
    first_time = make_first_times()
    for text in ("8 x 64", "8 x 64", "4 x 64"):
        with first_time(text):
            pass
    assert begun == ["8 x 64", "4 x 64"]


def test_durations():
    assert [duration(s) for s in (0.4, 61, 3_800)] == ["0:00:00", "0:01:01", "1:03:20"]
