"""DPO on HH harmless-base from the SFT model of `hh_sft.py`.

Claim: real, noisy preferences on two cores move a model of this size the right way, and
the standard error says how little 2,188 pairs make sure.
Command: dpojax train experiments/hh_dpo.py --output runs/hh-dpo
Hardware and time: two CPU cores that other work shared, 7 minutes.
Result: `dpojax eval --model runs/hh-dpo/final --reference runs/hh-sft/final --data DATA
--max-length 256`: accuracy 0.635 ± 0.045 on 115 held-out pairs, loss 0.676 ± 0.036,
margin 0.161 ± 0.071, KL on own samples 4.3 ± 0.2 nats.
"""

import os
from pathlib import Path

from dpojax.config import OptimizerConfig, TrainConfig

SHARED = Path(os.environ.get("DPOJAX_SHARED", "../shared"))


def config() -> TrainConfig:
    return TrainConfig(
        model="runs/hh-sft/final",
        data=(str(SHARED / "data" / "hh_harmless_base_test.jsonl.gz"),),
        max_length=256,
        batch_size=16,
        epochs=1,
        evaluate_every=1_000,
        save_every=50,
        optimizer=OptimizerConfig(learning_rate=2e-4),
    )
