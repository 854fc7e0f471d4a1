"""DPO on HH harmless-base from the SFT model of `hh_sft.py`.

Aim: real, noisy preferences on two cores. What a model of this size learns from 2,188
pairs is little, and the standard error will say how little is sure.
Command: dpojax train experiments/hh_dpo.py --output runs/hh-dpo
Result: not run to the end yet.
"""

import os
from pathlib import Path

from dpojax.config import OptimizerConfig, TrainConfig

SHARED = Path(os.environ.get("DPOJAX_SHARED", "../shared"))


def config() -> TrainConfig:
    return TrainConfig(
        model="runs/hh-sft/final",
        data=str(SHARED / "data" / "hh_harmless_base_test.jsonl.gz"),
        max_length=256,
        batch_size=16,
        epochs=1,
        evaluate_every=1_000,
        save_every=50,
        optimizer=OptimizerConfig(learning_rate=2e-4),
    )
