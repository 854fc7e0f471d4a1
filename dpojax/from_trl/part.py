"""What a conversion is put together from. Knows neither side's settings."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """What a recipe asks for that dpojax would do otherwise."""

    key: str
    sentence: str
    settled_by: tuple[str, ...] = ()  # flags that say what to do instead


class Part(NamedTuple):
    """Some settings of dpojax, with what is to be said about them."""

    settings: Mapping[str, Any] = {}
    notes: Mapping[str, str] = {}  # by key
    refusals: tuple[Refusal, ...] = ()


def number(values: Mapping[str, Any], key: str) -> float:
    """A number; YAML reads 1e-6, which has no point, as text.

    Raises:
      ValueError: if it is none.
    """
    value = values[key]
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} is {value!r}; it must be a number.") from error


def whole(values: Mapping[str, Any], key: str) -> int:
    """A whole number, likewise."""
    value = number(values, key)
    if not value.is_integer():
        raise ValueError(f"{key} is {value}; it must be a whole number.")
    return int(value)


def names(value: Any, key: str) -> tuple[str, ...]:
    """One name or a list of them."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(v, str) for v in listed):
        raise ValueError(f"{key} is {value!r}; it must be a name or a list of names.")
    return tuple(listed)
