"""The printed table of objectives: complete, and as the command shows it."""

from dataclasses import fields

import pytest

from dpojax.cli import main
from dpojax.config import LossConfig
from dpojax.losses.make import MODIFIERS, defaults_of
from dpojax.losses.table import MIXTURES, OBJECTIVES


@pytest.mark.parametrize("flags", [[], ["--markdown"]])
def test_the_command_prints_every_objective_with_its_formula_and_defaults(
    flags: list[str], capsys: pytest.CaptureFixture[str]
):
    main(["losses", *flags])
    printed = capsys.readouterr().out
    for name, objective in OBJECTIVES.items():
        assert name in printed and objective.formula in printed
        assert objective.source in printed
    assert all(mixture.terms in printed for mixture in MIXTURES.values())
    assert "beta 2, gamma_beta_ratio 0.5" in printed  # simpo


def test_every_setting_of_the_table_is_a_flag_and_no_other():
    flags = {field.name for field in fields(LossConfig)} - {"name"}
    settings = {name for one in OBJECTIVES.values() for name in defaults_of(one)}
    assert flags == settings | set(MODIFIERS)
