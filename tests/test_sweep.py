"""Sweeps: each of many runs in one program is the run that it would be alone."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_run import metrics_of

from dpojax.command_config import SweepConfig
from dpojax.config import LoraConfig, LossConfig, MovingConfig, TrainConfig
from dpojax.config_source import as_source
from dpojax.run import run
from dpojax.sweep.command import sweep
from dpojax.sweep.grid import Point, expand
from dpojax.user_code import load_names

MIXED = ("loss=dpo,ipo", "loss.beta=0.05,0.5", "optimizer.learning-rate=1e-3,1e-2")


def as_sweep(config: TrainConfig, output: Path, **settings: Any) -> SweepConfig:
    return SweepConfig(**(vars(config) | {"output": str(output)} | settings))


def weights_of(directory: Path) -> dict[str, np.ndarray]:
    return load_file(next((directory / "final").glob("*.safetensors")))


def assert_same_runs(sweep: Path, alone: Sequence[Path]) -> None:
    """The same lines, and the same weights to 1e-5."""
    for number, directory in enumerate(alone):
        found, expected = metrics_of(sweep / str(number)), metrics_of(directory)
        assert [list(row) for row in found] == [list(row) for row in expected]
        for one, two in zip(found, expected, strict=True):
            for name in ("loss", "logps/chosen", "grad_norm", "learning_rate"):
                np.testing.assert_allclose(one.get(name, 0), two.get(name, 0), 1e-5)
        ours, theirs = weights_of(sweep / str(number)), weights_of(directory)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def config(config: TrainConfig) -> TrainConfig:
    """Twenty steps, with and without adapters, see `adapted`."""
    every = {"log_every": 5, "evaluate_every": 10, "save_every": 10}
    return replace(config, steps=20, sample_prompts=0, **every)


@pytest.fixture(scope="module")
def adapted(config: TrainConfig) -> TrainConfig:
    return replace(config, lora=LoraConfig(rank=4, alpha=8.0))


def run_each(points: Sequence[Point], directory: Path) -> list[Path]:
    return [
        run(replace(point.config, output=str(directory / str(number)))).directory
        for number, point in enumerate(points)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapters", "all weights"])
def test_each_of_sixteen_runs_is_the_run_alone(
    config: TrainConfig, adapted: TrainConfig, tmp_path: Path, kind: str
):
    settings = adapted if kind == "adapters" else config
    sweep(as_sweep(settings, tmp_path / "sweep", over=MIXED, seeds=2))
    points = expand(settings, MIXED, 2)
    assert_same_runs(tmp_path / "sweep", run_each(points, tmp_path / "alone"))
