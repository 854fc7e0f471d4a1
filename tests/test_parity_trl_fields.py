"""The table of TRL's fields against TRL's own configurations."""

import dataclasses
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from dpojax.from_trl.defaults import DEFAULTS
from dpojax.from_trl.table import FIELDS

pytest.importorskip("trl")


@cache
def configurations() -> dict[str, tuple[type, ...]]:
    """TRL's classes by trainer."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOConfig
        from trl.experimental.orpo import ORPOConfig
        from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.kto_config import KTOConfig
        from trl.trainer.model_config import ModelConfig
        from trl.trainer.reward_config import RewardConfig
        from trl.trainer.sft_config import SFTConfig

    every = (ModelConfig, ScriptArguments, DatasetMixtureConfig)
    own = {
        "dpo": DPOConfig,
        "kto": KTOConfig,
        "cpo": CPOConfig,
        "orpo": ORPOConfig,
        "sft": SFTConfig,
        "reward": RewardConfig,
    }
    return {trainer: (config, *every) for trainer, config in own.items()}


def fields_of(trainer: str) -> Iterator[tuple[str, Any]]:
    for config in configurations()[trainer]:
        for field in dataclasses.fields(config):
            made = field.default_factory
            yield (
                field.name,
                field.default if made is dataclasses.MISSING else made(),
            )


@pytest.mark.parametrize("trainer", ["dpo", "kto", "cpo", "orpo", "sft", "reward"])
def test_every_field_of_trl_has_an_outcome(trainer: str):
    assert {name for name, _ in fields_of(trainer)} <= FIELDS.keys()


@pytest.mark.parametrize("trainer", ["dpo", "kto", "cpo", "orpo", "sft", "reward"])
def test_what_a_silent_recipe_means_is_trls_default(trainer: str):
    ours = DEFAULTS[trainer]
    wrong = {
        name: (default, ours[name])
        for name, default in fields_of(trainer)
        if name in ours and ours[name] != default
    }
    assert wrong == {}


@pytest.mark.parametrize("trainer", ["dpo", "kto", "cpo", "orpo", "sft", "reward"])
def test_trls_defaults_are_never_refused(trainer: str):
    refused = {
        name: default
        for name, default in fields_of(trainer)
        if FIELDS[name].outcome == "refused" and default not in FIELDS[name].neutral
    }
    assert refused == {}
