"""Sweeps: each of many runs in one program is the run that it would be alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_run import metrics_of

from dpojax.cli import parse
from dpojax.command_config import SweepConfig
from dpojax.config import LoraConfig, TrainConfig
from dpojax.run import run
from dpojax.sweep.command import sweep
from dpojax.sweep.grid import expand

TIMES = ("tokens_per_second", "memory_gib")


def as_sweep(config: TrainConfig, output: Path, **settings: Any) -> SweepConfig:
    return SweepConfig(**(vars(config) | {"output": str(output)} | settings))


@pytest.fixture(scope="module")
def adapters(config: TrainConfig) -> TrainConfig:
    return replace(
        config,
        steps=20,
        log_every=5,
        evaluate_every=10,
        save_every=10,
        sample_prompts=1,
        lora=LoraConfig(rank=4, alpha=8.0),
    )


def trial_config(directory: Path) -> TrainConfig:
    """The configuration of a run, by the file that it leaves."""
    (_, settings), _ = None, None
    return settings


def test_each_run_of_a_sweep_is_the_run_alone(adapters: TrainConfig, place: Path):
    output = place / "sweep"
    over = ("loss=dpo,ipo,simpo", "optimizer.learning-rate=1e-3,1e-2")
    sweep(as_sweep(adapters, output, over=over))
    points = expand(adapters, over, 1)
    for number, point in enumerate(points):
        alone = run(replace(point.config, output=str(place / f"alone-{number}")))
        one, two = metrics_of(output / str(number)), metrics_of(alone.directory)
        assert [row.keys() for row in one] == [row.keys() for row in two]
        print(number, point.changes, worst(one, two))
        a, b = (load_file(p / "final" / "adapter_model.safetensors") for p in (output / str(number), alone.directory))
        print(max(np.abs(a[k] - b[k]).max() for k in a))


def worst(one, two):
    return max(
        (abs(a[k] - b[k]) / max(1, abs(b[k])), k, a["step"], a[k], b[k])
        for a, b in zip(one, two, strict=True)
        for k in a
        if k not in TIMES and isinstance(a[k], float) and b[k] is not None
    )
