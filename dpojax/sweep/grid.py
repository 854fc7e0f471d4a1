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
_NOT_SWEPT = (
    "output",
    "resume",
    "stop_after",
    "fit",
    "memory_limit",
    "distributed",
    "track",
)
_NAMES = {"loss": "loss.name", "moving": "moving.kind"}  # of flags that name a group


class Point(NamedTuple):
    """A run of the grid."""

    changes: dict[str, str]  # what is varied, and the values as they were given
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
    for name, values in axes:
        meant = [read[name, value] for value in values]
        for value, one in zip(values, meant, strict=True):
            if meant.count(one) > 1:
                raise ValueError(f"--over {name} lists {value} twice; list it once.")
    points = []
    for values in product(*(values for _, values in axes)):
        settings, changes = config, {}
        for (name, _), value in zip(axes, values, strict=True):
            settings = _with(settings, name, read[name, value])
            changes[_flag(name)] = value
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
    return _field(config, given), values


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


def _flag(name: str) -> str:
    """A field as its flag calls it, without dashes."""
    return {whole: short for short, whole in _NAMES.items()}.get(name, name)


def _read(config: TrainConfig, name: str, value: str) -> Any:
    """A value as the flag of that name takes it in `dpojax train`."""
    flag = "--" + _flag(name).replace("_", "-")
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
