"""The embedded default, whole, as `dpojax train` runs it: minutes long."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpojax.config import LossConfig, TrainConfig
from dpojax.sentiment import run_sentiment


@pytest.mark.slow
def test_dpo_raises_the_reward_and_ranks_held_out_pairs(tmp_path: Path):
    output = tmp_path / "run"
    # A process of its own: as users compile it, on the devices that they have.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    printed = subprocess.run(
        [sys.executable, "-m", "dpojax", "train", "--output", str(output)],
        check=True,
        capture_output=True,
        encoding="utf-8",
        env=environment,
    ).stdout
    print(printed)  # shown by `pytest -s`, and where the test fails

    def after(label: str) -> float:
        numbers = re.findall(r"(-?\d+\.\d+) ±", line_of(label))
        return float(numbers[1])

    def line_of(label: str) -> str:
        return next(line for line in printed.splitlines() if label in line)

    assert after("reward accuracy on held-out pairs") >= 0.95
    assert "0.000 ± 0.000" in line_of("KL(policy")  # before the first step
    rise = re.search(r"rose by (\d+) %", printed)
    assert rise is not None and int(rise.group(1)) >= 30
    assert (output / "aligned" / "final" / "model.safetensors").is_file()


def test_settings_that_the_embedded_task_does_not_have_are_refused():
    with pytest.raises(ValueError, match="needs --model and --data"):
        run_sentiment(TrainConfig(batch_size=3))
    with pytest.raises(ValueError, match="trains a reward model"):
        run_sentiment(TrainConfig(loss=LossConfig(name="bradley_terry")))
    with pytest.raises(ValueError, match="forgets what it is given"):
        run_sentiment(TrainConfig(loss=LossConfig(name="npo")))
