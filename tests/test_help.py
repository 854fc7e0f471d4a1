"""What --help shows: every flag described, every group within a screen of 80 x 50."""

import re

import pytest

from dpojax.cli import main

COMMANDS = [
    "train", "reference", "plan", "sweep", "eval", "bench", "losses", "score", "init",
    "generate", "export", "report", "watch", "completion",
]  # fmt: skip
WIDTH, HEIGHT = 80, 50


def help_of(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    return capfd.readouterr().out.splitlines()


def groups_of(lines: list[str]) -> list[list[str]]:
    """The boxes, each with its borders."""
    starts = [number for number, line in enumerate(lines) if line.startswith("╭")]
    ends = [number for number, line in enumerate(lines) if line.startswith("╰")]
    return [lines[a : b + 1] for a, b in zip(starts, ends, strict=True)]


def flags_of(group: list[str]) -> dict[str, str]:
    """Flags and positional arguments of a box, with what stands below each."""
    found: dict[str, str] = {}
    name = ""
    for line in group[1:-1]:
        text = line.strip("│")
        if re.match(r" (-|[A-Z{\[])", text):
            # Short flags have their text beside them, long ones below.
            name, _, beside = text.strip().partition("  ")
            found[name] = beside.strip() + " "
        elif name:
            found[name] += text.strip() + " "
    return found


def test_the_commands_are_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    usage = help_of("", monkeypatch, capfd)[0]
    listed = re.search(r"\{(.*)\}", usage)
    assert listed is not None and listed[1].split(",") == COMMANDS


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_group_of_a_help_fits_a_screen(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    lines = help_of(command, monkeypatch, capfd)
    groups = groups_of(lines)
    assert groups and max(map(len, groups)) <= HEIGHT
    assert max(len(line) for group in groups for line in group) <= WIDTH


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_help_is_described(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    groups = groups_of(help_of(command, monkeypatch, capfd))
    described: dict[str, str] = {}
    for group in groups:
        described |= flags_of(group)
    assert "-h, --help" in described
    bare = re.compile(r"\((default|required)[^()]*\)|\(optional\)")
    empty = [name for name, text in described.items() if not bare.sub("", text).strip()]
    assert empty == []
