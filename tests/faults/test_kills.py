"""Runs that are killed by SIGKILL, at random, and end as if nothing had happened.

`pytest -m faults` kills two hundred times; the short form is one of the slow tests.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kills import Kills, assert_same_run, prepare, run_killed, run_whole

from dpojax.config import LoraConfig, LossConfig, MovingConfig, TrainConfig

NUM_KILLS = 34  # of each kind of run
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": LoraConfig(rank=4, alpha=8.0, dropout=0.1)},
    "kto": {"loss": LossConfig(name="kto")},
    "bco, which has a running mean": {"loss": LossConfig(name="bco")},
    "packed, in microbatches": {"row_length": 384, "microbatches": 2},
    "moving reference": {"moving": MovingConfig(kind="bema", every=3)},
    "two processes": {},
}


def kill_runs(
    config: TrainConfig, kind: str, num_kills: int, directory: Path
) -> list[Kills]:
    """Runs of one kind, killed so many times together, each compared in the end."""
    config = replace(
        config,
        steps=24,
        log_every=5,
        evaluate_every=6,
        save_every=2,
        **KINDS[kind],
    )
    num_processes = 2 if kind == "two processes" else 1
    chance = random.Random(kind)

    def named(name: str) -> TrainConfig:
        return replace(config, output=str(directory / name))

    prepare()
    run_whole(named("compiled"), num_processes)
    seconds = run_whole(named("whole"), num_processes)
    found: list[Kills] = []
    while (left := num_kills - sum(kills.total for kills in found)) > 0:
        name = f"killed {len(found)}"
        found.append(run_killed(named(name), num_processes, seconds, left, chance))
        assert_same_run(directory / "whole", directory / name)
    return found


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_a_run_ends_as_if_nothing_had_happened(
    config: TrainConfig, kind: str, tmp_path: Path
):
    found = kill_runs(config, kind, NUM_KILLS, tmp_path)
    where = (
        f"{sum(kills.before for kills in found)} before there was a checkpoint, "
        f"{sum(kills.training for kills in found)} between checkpoints, "
        f"{sum(kills.saving for kills in found)} while one was written"
    )
    print(f"{kind}: {NUM_KILLS} kills of {len(found)} runs: {where}")


@pytest.mark.slow
def test_killed_six_times_a_run_ends_as_if_nothing_had_happened(
    config: TrainConfig, tmp_path: Path
):
    kill_runs(config, "bco, which has a running mean", 6, tmp_path)
