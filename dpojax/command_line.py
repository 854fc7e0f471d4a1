"""A run's settings as the command that gives them. Knows no setting but by its name."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from dpojax.config import TrainConfig

# Flags of a group's first setting, which bear the group's name.
_GROUPS = {"--loss.name": "--loss", "--moving.kind": "--moving"}
# A path from the root or from home, by itself or after what a setting puts before it,
# as in precomputed:/models/sft and 0.5*/losses.py:mine.
_PLACE = r"(^|(?<=[:+*]))[~/][^+]*"


def as_command(configuration: Mapping[str, Any]) -> str:
    """The command whose settings are these, without what are defaults.

    Args:
      configuration: settings as `dataclasses.asdict` gives them or JSON holds them.
    """
    defaults = asdict(TrainConfig())
    words = ["dpojax", "train", *_flags(configuration, defaults, "--")]
    return shlex.join(words)


def without_places(value: Any) -> Any:
    """The same settings, in which files have their names but not their directories.

    What a path tells of a machine and its users is nobody's concern elsewhere. Names of
    the hub and relative paths stay what they are.
    """
    if isinstance(value, str):
        return re.sub(_PLACE, lambda found: PurePath(found[0]).name, value)
    if isinstance(value, Mapping):
        return {key: without_places(part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [without_places(part) for part in value]
    return value


def _flags(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], start: str
) -> Iterator[str]:
    for name, value in settings.items():
        flag = start + name.replace("_", "-")
        default = defaults.get(name)
        if isinstance(default, dict) and default:  # a group of settings
            yield from _flags(value, default, f"{flag}.")
        elif _plain(value) != _plain(default):
            yield _GROUPS.get(flag, flag)
            # A flag that is off by default takes no value.
            yield from () if default is False else _words(value)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for pair in value.items():
            yield from map(str, pair)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from map(str, value)
    else:
        yield str(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
