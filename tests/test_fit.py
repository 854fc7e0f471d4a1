"""The fastest way of computing a step that fits: the choice, and a run that does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from dpojax.cli import _load_experiment
from dpojax.config import LossConfig, MovingConfig, TrainConfig
from dpojax.fit import GIB, Way, choose, describe, device_memory, ways
from dpojax.fitting import check_memory
from dpojax.prepare import make_configured_loss
from dpojax.run import run


class Program(NamedTuple):
    """What `choose` asks a compiled step for; of two GiB, one is donated."""

    temp_size_in_bytes: float
    argument_size_in_bytes: float = 2 * GIB
    output_size_in_bytes: float = GIB
    alias_size_in_bytes: float = GIB

    def memory_analysis(self) -> "Program":
        return self


def compiled_to(temporaries: dict[str, float]) -> Callable[[Way], Any]:
    """Programs by their names; what has none is more than the compiler takes."""

    def compile_step(way: Way) -> Program:
        if str(way) not in temporaries:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of HBM")
        return Program(temporaries[str(way)] * GIB)

    return compile_step


SIZES = {
    "dots": 9.0,
    "dots_except_up": 8.95,
    "save_attention": 8.0,
    "full": 4.0,
    "full in 2 microbatches": 3.0,
}


def test_ways_go_from_the_fastest_to_the_leanest():
    names = [str(way) for way in ways(1, 5)]
    more = ["full in 2 microbatches", "full in 4 microbatches"]
    assert names == ["none", "dots", "dots_except_up", "save_attention", "full", *more]
    assert [way.num_microbatches for way in ways(2, 3)] == [2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (12.3, "dots"),
        (12.2, "dots_except_up"),
        (12.1, "save_attention"),
        (8, "full"),
        (6, "full in 2 microb"),
    ],
)
def test_the_first_way_within_nine_tenths_of_the_limit_is_taken(
    limit: float, expected: str
):
    """Arguments, outputs and what is donated are 2 GiB together: dots needs 11."""
    found = choose(ways(1, 2), compiled_to(SIZES), limit * GIB)
    assert str(found.way).startswith(expected)
    line = describe(found)
    assert line.startswith(f"fit: {found.way}, ") and f"of a device's {limit}" in line
    assert "too much: none more than there is" in line


def test_where_nothing_fits_the_least_need_is_named():
    with pytest.raises(ValueError, match="5.5 GiB.*full in 2 microbatches, needs 5 Gi"):
        choose(ways(1, 2), compiled_to(SIZES), 5.5 * GIB)


def test_a_failure_of_the_compiler_is_not_taken_for_one_of_memory():
    def fail(way: Way) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        choose(ways(1, 2), fail, GIB)


def test_a_device_has_what_is_said_or_its_share_of_the_machine():
    assert device_memory(0.5) == GIB / 2
    assert 0 < device_memory(None) < 2**50


def test_a_run_fits_itself_and_keeps_what_it_chose(
    config: TrainConfig, place: Path, capsys: Any
):
    fitted = replace(
        config,
        output=str(place / "fitted"),
        fit=True,
        memory_limit=1.0,
        steps=1,
        sample_prompts=0,
    )
    directory = run(fitted).directory
    assert "fit: none, 0.00" in capsys.readouterr().out
    kept = _load_experiment(directory / "config.py")
    assert (kept.remat, kept.fit, kept.memory_limit) == ("none", False, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": True, "remat": "dots"}, "leave out --remat"),
        ({"fit": True, "memory_limit": 0.0}, "must be positive"),
        ({"memory_limit": 1.0}, "give --fit too"),
        (
            {"offload": ("reference",), "loss": LossConfig(name="simpo")},
            "'simpo' uses no reference to be offloaded",
        ),
        (
            {"offload": ("reference",), "moving": MovingConfig(kind="tr_dpo")},
            "A reference that moves is part of the state",
        ),
    ],
)
def test_settings_of_memory_without_effect_are_refused(
    settings: dict[str, Any], message: str
):
    config = TrainConfig(**settings)
    with pytest.raises(ValueError, match=message):
        check_memory(config, make_configured_loss(config.loss))
