"""DPO on BLiMP's minimal pairs: the grammatical sentence is the chosen one.

Claim: held-out pairs are ranked right in at least 80 % of the cases.
Command: dpojax train experiments/blimp_dpo.py --output runs/blimp-dpo
Hardware and time: two CPU cores that other work shared, 24 minutes, of which the
vocabulary of 50,304 takes the most.
Result: `dpojax eval --model runs/blimp-dpo/final --reference runs/blimp-sft/final
--data DATA --max-examples 20000 --max-length 64`: accuracy 0.883 ± 0.010 on 1,000
held-out pairs, loss 0.281 ± 0.016; every chosen log-ratio is negative.
"""

import os
from pathlib import Path

from dpojax.config import OptimizerConfig, TrainConfig

SHARED = Path(os.environ.get("DPOJAX_SHARED", "../shared"))


def config() -> TrainConfig:
    return TrainConfig(
        model="runs/blimp-sft/final",
        data=(str(SHARED / "data" / "blimp_pairs.jsonl.gz"),),
        max_examples=20_000,
        max_length=64,
        batch_size=64,
        epochs=1,
        sample_tokens=24,
        evaluate_every=100,
        save_every=1_000,
        optimizer=OptimizerConfig(learning_rate=5e-4),
    )
