"""A recipe to a `TrainConfig`, with an outcome for each of its keys."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from dpojax.config import (
    LoraConfig,
    LossConfig,
    MovingConfig,
    OptimizerConfig,
    TrainConfig,
)
from dpojax.from_trl.course import batches, occasions, optimizer, trackers
from dpojax.from_trl.defaults import DEFAULTS, NONE_IS_A_VALUE, TRAINERS, told_by
from dpojax.from_trl.network import network
from dpojax.from_trl.objective import objective
from dpojax.from_trl.part import Part, Refusal
from dpojax.from_trl.recipe import Recipe
from dpojax.from_trl.sources import sources
from dpojax.from_trl.table import FIELDS, RENAMED

_GROUPS = {
    "loss": LossConfig,
    "lora": LoraConfig,
    "moving": MovingConfig,
    "optimizer": OptimizerConfig,
}


class Converted(NamedTuple):
    """What a recipe became."""

    config: TrainConfig
    trainer: str
    outcomes: Mapping[str, str]  # one for each key of the recipe
    assumed: Mapping[str, Any]  # TRL's defaults where it is silent, of what was used


def convert(
    recipe: Recipe,
    *,
    trainer: str | None = None,
    processes: int | None = None,
    settled: Collection[str] = (),
) -> Converted:
    """Converts a recipe.

    Args:
      recipe: as read.
      trainer: of TRL. Default: the one that alone has one of the recipe's keys.
      processes: of TRL's run; its batch is that of one process times these.
      settled: flags that are given besides; what they say is not refused.

    Raises:
      ValueError: naming all keys that ask for what dpojax would do otherwise.
    """
    given = {RENAMED.get(key, key): value for key, value in recipe.values.items()}
    trainer = _trainer(recipe, given, trainer)
    _check_known(recipe, given, trainer)
    values = {**DEFAULTS[trainer]}
    for key, value in given.items():
        if value is not None or key in NONE_IS_A_VALUE:
            values[key] = value
    parts = _parts(recipe, trainer, values, processes, settled)
    refusals = [
        refusal
        for refusal in (
            *_refused_fields(given),
            *(r for p in parts for r in p.refusals),
        )
        if not _is_settled(refusal, settled)
    ]
    if refusals:
        told = "; ".join(f"{one.key}: {one.sentence}{_ways(one)}" for one in refusals)
        raise ValueError(f"{recipe.path} cannot be taken over as it is. {told}.")
    notes = {key: note for part in parts for key, note in part.notes.items()}
    outcomes = {key: notes.get(key, _outcome(key)) for key in given}
    assumed = {
        key: value
        for key, value in DEFAULTS[trainer].items()
        if key not in given and value not in (None, False, [])
    }
    return Converted(_configured(parts), trainer, outcomes, assumed)


def _trainer(recipe: Recipe, given: Mapping[str, Any], trainer: str | None) -> str:
    trainer = trainer or told_by(given)
    if trainer is None:
        raise ValueError(
            f"{recipe.path} does not say which trainer of TRL it is for; give "
            f"--trl-trainer, one of {', '.join(TRAINERS)}."
        )
    if trainer not in TRAINERS:
        raise ValueError(
            f"--trl-trainer is {trainer!r}; it must be one of {', '.join(TRAINERS)}."
        )
    return trainer


def _check_known(recipe: Recipe, given: Mapping[str, Any], trainer: str) -> None:
    every = {key for own in DEFAULTS.values() for key in own}
    for key in given:
        if key not in FIELDS:
            near = get_close_matches(key, FIELDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"{recipe.path}: TRL has no field {key!r}{hint}")
        if key in every and key not in DEFAULTS[trainer]:
            has = [name for name, own in DEFAULTS.items() if key in own]
            raise ValueError(
                f"{recipe.path}: {key} is of {', '.join(has)}, not of {trainer}."
            )


def _parts(
    recipe: Recipe,
    trainer: str,
    values: Mapping[str, Any],
    processes: int | None,
    settled: Collection[str],
) -> list[Part]:
    try:
        return [
            objective(trainer, values),
            sources(values),
            network(trainer, values),
            batches(values, processes, settled),
            optimizer(values),
            occasions(values),
            trackers(values),
        ]
    except ValueError as error:
        raise ValueError(f"{recipe.path}: {error}") from error


def _refused_fields(given: Mapping[str, Any]) -> list[Refusal]:
    return [
        Refusal(key, FIELDS[key].text, FIELDS[key].settled_by)
        for key, value in given.items()
        if FIELDS[key].outcome == "refused" and value not in FIELDS[key].neutral
    ]


def _is_settled(refusal: Refusal, settled: Collection[str]) -> bool:
    return not set(refusal.settled_by).isdisjoint(settled)


def _ways(refusal: Refusal) -> str:
    if not refusal.settled_by:
        return " (without it dpojax can)"
    return f" ({' or '.join(refusal.settled_by)} after the recipe settles it)"


def _outcome(key: str) -> str:
    row = FIELDS[key]
    if row.outcome == "mapped":
        return row.text.replace("`", "")
    return f"not used: {row.text}"


def _configured(parts: list[Part]) -> TrainConfig:
    settings: dict[str, Any] = {}
    for part in parts:
        settings |= part.settings
    for group, make in _GROUPS.items():
        if group in settings:
            settings[group] = make(**settings[group])
    return TrainConfig(**settings)
