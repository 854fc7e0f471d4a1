"""From `--over field=a,b,c` and `--seeds` to the settings of each run, in order.

This file parses and combines; it knows no model and no data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from itertools import product
from typing import Any, NamedTuple

import tyro

from dpojax.config import TrainConfig

# What is no property of a run, or is told otherwise.
_NOT_SWEPT = ("output", "resume", "stop_after", "fit", "memory_limit", "distributed")
_NAMES = {"loss": "loss.name", "moving": "moving.kind"}  # of flags that name a group


class Point(NamedTuple):
    """A run of the grid."""

    changes: dict[str, str]  # fields and their values, as they were given
    config: TrainConfig


def expand(config: TrainConfig, over: Sequence[str], num_seeds: int) -> list[Point]:
    """Every combination; the last field that was given changes fastest, then seeds.

    Args:
      config: what all runs share.
      over: ``field=a,b,c`` each, as on the command line.
      num_seeds: so many seeds from the shared one on, for each combination.

    Raises:
      ValueError: for a field or a value that cannot be, or that stands there twice.
    """
    axes = [_axis(config, text) for text in over]
    names = [name for name, _ in axes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--over gives {name} twice; list all values in one.")
    if num_seeds < 1:
        raise ValueError(f"--seeds is {num_seeds}; give at least 1.")
    if num_seeds > 1:
        if "seed" in names:
            raise ValueError("Give seeds by --seeds or --over seed=…, not both.")
        seeds = [str(config.seed + number) for number in range(num_seeds)]
        axes.append(("seed", seeds))
    read = {
        (name, value): _read(config, name, value)
        for name, values in axes
        for value in values
    }
    points = []
    for values in product(*(values for _, values in axes)):
        changes, settings = dict(zip(dict(axes), values, strict=True)), config
        for change in changes.items():
            settings = _with(settings, change[0], read[change])
        points.append(Point(changes, settings))
    return points


def _axis(config: TrainConfig, text: str) -> tuple[str, list[str]]:
    """A field by its dotted name, and its values."""
    given, equals, listed = text.partition("=")
    values = listed.split(",")
    if not equals or "" in values:
        raise ValueError(
            f"--over {text} is no field with values; write --over loss.beta=0.1,0.5."
        )
    name = _field(config, given)
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"--over {given} lists {value} twice; list it once.")
    return name, values


def _field(config: TrainConfig, given: str) -> str:
    name = given.strip().removeprefix("--").replace("-", "_")
    name = _NAMES.get(name, name)
    known = list(_names_of(config))
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see dpojax train --help."
        raise ValueError(f"--over {given} is no setting of a run; {hint}")
    if name.split(".")[0] in _NOT_SWEPT:
        raise ValueError(
            f"--over {given}: all runs of a sweep share it; give --{name}."
        )
    return name


def _names_of(settings: Any, within: str = "") -> Iterator[str]:
    for each in fields(settings):
        value, name = vars(settings)[each.name], f"{within}{each.name}"
        if is_dataclass(value):
            yield from _names_of(value, f"{name}.")
        else:
            yield name


def _with(settings: Any, name: str, value: Any) -> Any:
    """The settings with another value of a field, by its dotted name."""
    first, _, rest = name.partition(".")
    within = _with(vars(settings)[first], rest, value) if rest else value
    return replace(settings, **{first: within})


def _read(config: TrainConfig, name: str, value: str) -> Any:
    """A value as the flag of that name takes it in `dpojax train`."""
    flags = {whole: short for short, whole in _NAMES.items()}
    flag = "--" + flags.get(name, name).replace("_", "-")
    arguments = [f"{flag}={value}"]  # a negative number is a value too
    try:
        settings: Any = tyro.cli(
            TrainConfig, args=arguments, default=config, console_outputs=False
        )
    except SystemExit:
        raise ValueError(
            f"--over {name}={value}: {flag} does not take {value!r}; see "
            "dpojax train --help."
        ) from None
    for part in name.split("."):
        settings = vars(settings)[part]
    return settings
