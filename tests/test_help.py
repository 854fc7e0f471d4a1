"""What --help shows: every flag described, every group within a screen of 80 x 50.

Numbers say what they measure in their first three words. A default says whose it is,
in brackets that begin with a source, or what it does: `1: none do`. Of what has none
by itself, `Default:` or the group's heading says what comes instead.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from dpojax.cli import main

COMMANDS = [
    "train", "reference", "plan", "sweep", "eval", "bench", "losses", "score", "init",
    "generate", "export", "report", "watch", "completion",
]  # fmt: skip
WIDTH, HEIGHT = 80, 50

MEASURES = {
    # units
    "gib", "tokens", "positions", "examples", "records", "prompts", "completions",
    "steps", "step", "times", "checkpoints", "parts", "runs", "seeds", "devices",
    "copies", "processes", "layers", "heads", "rows", "width",
    # pure numbers
    "number", "share", "shares", "probability", "weight", "strength", "scale", "rate",
    "decay", "power", "order", "rank", "norm", "margin", "temperature", "sigma", "port",
}  # fmt: skip
# Of ours the reason follows.
SOURCE = r"\((TRL|Zephyr|paper|paper's code|as train|as eval|ours: [^()]+)\b[^()]*\)"


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


class Described(NamedTuple):
    """What a help says of a flag, and what its group's heading does."""

    flag: str
    text: str
    default: str
    heading: str


def described(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Described]:
    for group in groups_of(help_of(command, monkeypatch, capfd)):
        before, rule, _ = "\n".join(group).partition("│ ──")
        for flag, text in flags_of(group).items():
            found = re.fullmatch(r"(.*) \(default: ?([^()]*)\) *", text)
            if found:
                yield Described(
                    flag, found[1], found[2].strip(), before if rule else ""
                )


def is_explained(text: str, default: str) -> bool:
    """Whether the default stands before what it means, as in `0: none`."""
    named = re.findall(r"([\w.-]*\w): ", text)
    if re.fullmatch(r"[\d.e-]+", default):
        numbers = [float(word) for word in named if re.fullmatch(r"-?[\d.]+", word)]
        return float(default) in numbers
    return default in map(str.lower, named)


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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_of_a_help_says_what_it_measures(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    numbers = {
        each.flag: re.findall(r"[\w'-]+", each.text)[:3]
        for each in described(command, monkeypatch, capfd)
        if re.search("INT|FLOAT", each.flag)
    }
    silent = {
        flag: words
        for flag, words in numbers.items()
        if not MEASURES & {word.casefold() for word in words}
    }
    assert silent == {}
    assert len(numbers) > 50 or command not in ("train", "plan", "bench", "sweep")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_default_of_a_help_has_a_source(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    silent = {}
    for each in described(command, monkeypatch, capfd):
        if each.default == "None":
            is_said = "Default: " in each.text or "None keeps" in each.heading
        else:
            is_nothing = each.default in ("", "False")  # none are given, or it is off
            has_source = re.search(SOURCE, each.text) is not None
            is_said = is_nothing or has_source or is_explained(each.text, each.default)
        if not is_said:
            silent[each.flag] = each.text
    assert silent == {}
