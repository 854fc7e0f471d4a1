"""A configuration as the Python file that `dpojax train` takes. Knows no setting."""

from dataclasses import MISSING, Field, fields
from typing import Any

from dpojax.config import TrainConfig

_WIDTH = "    "


def as_source(config: TrainConfig) -> str:
    """A file whose ``config()`` returns what is given, without what are defaults."""
    used: set[str] = set()
    body = _call(config, 1, used)
    imports = ", ".join(sorted(used))
    return (
        f"from dpojax.config import {imports}\n\n\n"
        f"def config() -> {type(config).__name__}:\n{_WIDTH}return {body}\n"
    )


def _call(value: Any, depth: int, used: set[str]) -> str:
    used.add(type(value).__name__)
    inside = _WIDTH * (depth + 1)
    lines = [
        f"{inside}{each.name}={_literal(found, depth + 1, used)},\n"
        for each in fields(value)
        if (found := vars(value)[each.name]) != _default(each)
    ]
    if not lines:
        return f"{type(value).__name__}()"
    return f"{type(value).__name__}(\n{''.join(lines)}{_WIDTH * depth})"


def _literal(value: Any, depth: int, used: set[str]) -> str:
    if type(value).__module__ == TrainConfig.__module__:
        return _call(value, depth, used)
    return repr(value)


def _default(each: "Field[Any]") -> Any:
    if each.default_factory is not MISSING:
        return each.default_factory()
    return each.default
