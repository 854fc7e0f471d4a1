"""What the settings of losses may be; one loss may limit a setting in its own way.

Nothing here knows what the settings do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from dpojax.losses.modifiers import Divergence, Weighting


class Limit(NamedTuple):
    """What a setting may be, in words and as a test."""

    meaning: str
    allows: Callable[[Any], bool]


def _number(meaning: str, allows: Callable[[float], bool]) -> Limit:
    def check(value: Any) -> bool:
        return not isinstance(value, (str, bool)) and allows(value)

    return Limit(meaning, check)


def _one_of(names: tuple[str, ...]) -> Limit:
    return Limit(f"one of {', '.join(names)}", lambda value: value in names)


_POSITIVE = _number("a positive number", lambda value: 0 < value < float("inf"))
_NOT_NEGATIVE = _number("at least 0", lambda value: 0 <= value < float("inf"))
_FINITE = _number("a finite number", lambda value: abs(value) < float("inf"))
LIMITS: dict[str, Limit] = {
    "beta": _POSITIVE,
    "label_smoothing": _number("in [0, 0.5)", lambda value: 0 <= value < 0.5),
    "exo_pair.label_smoothing": _number(
        "in (0, 0.5); the paper takes 1e-3", lambda value: 0 < value < 0.5
    ),
    "alpha": _FINITE,
    "alphapo.alpha": _number(
        "a finite number that is not 0", lambda value: 0 < abs(value) < float("inf")
    ),
    "infonca.alpha": _POSITIVE,
    "nca.alpha": _POSITIVE,
    "exo.alpha": _POSITIVE,
    "tau": _POSITIVE,
    "gamma": _FINITE,
    "gamma_beta_ratio": _NOT_NEGATIVE,
    "delta": _NOT_NEGATIVE,
    "penalty": _NOT_NEGATIVE,
    "rho": _number("in [0, 1)", lambda value: 0 <= value < 1),
    "desirable_weight": _NOT_NEGATIVE,
    "undesirable_weight": _NOT_NEGATIVE,
    "center": _NOT_NEGATIVE,
    "margin_scale": _NOT_NEGATIVE,
    "ld_alpha": _number("in [0, 1]", lambda value: 0 <= value <= 1),
    "divergence_alpha": _FINITE,
    "divergence": _one_of(get_args(Divergence)),
    "weighting": _one_of(get_args(Weighting)),
    "average": Limit("true or false", lambda value: isinstance(value, bool)),
}


def limit_of(name: str, setting: str) -> Limit | None:
    """A setting's limit: that of the loss called `name`, or else of all with it."""
    return LIMITS.get(f"{name}.{setting}", LIMITS.get(setting))


def check_setting(name: str, setting: str, value: object) -> None:
    """Refuses what the loss called `name` cannot take.

    Raises:
      ValueError: if the value is beyond the limit.
    """
    limit = limit_of(name, setting)
    # A user's own loss may have settings of its own, and checks them itself.
    if limit is not None and not limit.allows(value):
        raise ValueError(f"{setting} must be {limit.meaning}, not {value}.")
