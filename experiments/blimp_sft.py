"""Imitate the grammatical sentences of BLiMP: the reference for `blimp_dpo.py`.

Claim: rows with empty prompts train; the first token is predicted from BOS.
Command: dpojax train experiments/blimp_sft.py --output runs/blimp-sft
Hardware and time: two CPU cores that other work shared, 13 minutes.
Result: held-out loss 10.88 before, 3.86 nats a token after 297 steps.
"""

import os
from pathlib import Path

from dpojax.config import LossConfig, OptimizerConfig, TrainConfig

SHARED = Path(os.environ.get("DPOJAX_SHARED", "../shared"))


def config() -> TrainConfig:
    return TrainConfig(
        loss=LossConfig(name="sft"),
        model="models/small",
        data=(str(SHARED / "data" / "blimp_pairs.jsonl.gz"),),
        max_examples=20_000,
        max_length=64,
        batch_size=64,
        epochs=1,
        sample_tokens=24,
        evaluate_every=1_000,
        save_every=1_000,
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine"),
    )
