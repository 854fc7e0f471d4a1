"""Flags that say where settings come from, beside those that are settings."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpojax.from_trl.convert import Converted, convert
from dpojax.from_trl.recipe import read_recipe


class Origin(NamedTuple):
    """Where the settings come from, and what is to be done with them."""

    recipe: Path | None
    trainer: str | None
    processes: int | None
    print_config: bool


def take_flags(arguments: list[str]) -> tuple[Origin, list[str]]:
    """Takes these flags out of a command's; the others keep their order."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--from-trl", type=Path)
    parser.add_argument("--trl-trainer")
    parser.add_argument("--trl-processes", type=int)
    parser.add_argument("--print-config", action="store_true")
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}.") from error
    if known.from_trl is None and (known.trl_trainer or known.trl_processes):
        raise ValueError(
            "--trl-trainer and --trl-processes are about a recipe; give --from-trl."
        )
    return (
        Origin(
            known.from_trl, known.trl_trainer, known.trl_processes, known.print_config
        ),
        rest,
    )


def from_recipe(origin: Origin, rest: Iterable[str]) -> Converted:
    """The recipe that the flags name, converted."""
    assert origin.recipe is not None
    return convert(
        read_recipe(origin.recipe),
        trainer=origin.trainer,
        processes=origin.processes,
        settled={flag.split("=")[0].replace("_", "-") for flag in rest},
    )


def as_lines(converted: Converted) -> list[str]:
    """What became of each key, for people."""
    lines = [f"{key}: {text}" for key, text in converted.outcomes.items()]
    if converted.assumed:
        lines.append(
            "The recipe is silent, so as TRL 1.16 does: " + _listed(converted.assumed)
        )
    return [f"TRL recipe for {converted.trainer}", *lines]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
