"""The table of objectives: what each is called, needs and is averaged over.

Adding a loss is one function, one row here and one by-hand test.
"""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Literal, NamedTuple

from dpojax.losses.likelihood import sft
from dpojax.losses.pairs import dpo
from dpojax.losses.scores import Outcome


class Objective(NamedTuple):
    """A loss and what a run must provide for it."""

    loss: Callable[..., Outcome]  # takes one `Scores` per completion
    num_completions: int
    needs_reference: bool
    averaged_over: Literal["examples", "tokens"]
    learning_rate: float  # default for full fine-tuning, with AdamW


OBJECTIVES = {
    # Learning rate 1e-6: Rafailov et al. 2023, appendix B.
    "dpo": Objective(dpo, 2, True, "examples", 1e-6),
    # Learning rate 2e-5: TRL's SFTConfig.
    "sft": Objective(sft, 1, False, "tokens", 2e-5),
}

_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": ("a positive number", lambda value: 0 < value < float("inf")),
    "label_smoothing": ("in [0, 0.5)", lambda value: 0 <= value < 0.5),
}


def make_loss(name: str, **settings: float) -> Objective:
    """The objective called `name`, with its settings bound.

    Args:
      name: a key of `OBJECTIVES`.
      **settings: keyword arguments of the loss; those not given keep its defaults.

    Returns:
      The row of the table, its loss now a function of `Scores` alone.

    Raises:
      ValueError: for an unknown name, or a setting that the loss does not have or
        whose value it does not allow.
    """
    if name not in OBJECTIVES:
        nearest = get_close_matches(name, OBJECTIVES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"There is no loss {name!r}; did you mean {nearest!r}? "
            f"Losses: {', '.join(OBJECTIVES)}."
        )
    objective = OBJECTIVES[name]
    known = [
        parameter.name
        for parameter in inspect.signature(objective.loss).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    for setting, value in settings.items():
        if setting not in known:
            raise ValueError(
                f"The loss {name!r} has no setting {setting!r}; "
                f"it has {', '.join(known) or 'none'}."
            )
        meaning, allows = _ALLOWED[setting]
        if not allows(value):
            raise ValueError(f"{setting} must be {meaning}, not {value}.")
    return objective._replace(loss=partial(objective.loss, **settings))
