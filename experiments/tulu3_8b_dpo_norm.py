"""Tulu-3-8B-DPO: length-normalised DPO on Tulu 3's mixture of preferences.

Not run here: the tests build it. Published, SFT to DPO: average 60.4 to 64.4, IFEval
72.8 to 81.1, AlpacaEval 2 (length-controlled) 12.4 to 33.5, GSM8K 76.2 to 84.3.
Command: dpojax train experiments/tulu3_8b_dpo_norm.py --distributed auto --output DIR
Slice: v5e:4x8, 32 chips in 8 workers: fsdp 32, one microbatch, layers rematerialised.
Plan: dpojax plan experiments/tulu3_8b_dpo_norm.py --topology v5e:4x8
--model experiments/shapes/Llama-3.1-Tulu-3-8B-SFT
--prompt-tokens 256 --completion-tokens 512 --spread 0.5
Sources: Lambert et al. 2024, arXiv:2411.15124, section 5, and the command in
open-instruct's `docs/tulu3.md`: model, data, dpo_norm with beta 5, one epoch, batches
of 8 devices x 16 accumulated, 2,048 tokens, AdamW without decay, a linear schedule from
5e-7 with a tenth of warm-up. Its 70B model takes 2e-7. The reference is computed once,
as `dpo_tune_cache.py` does. Ours: 1,000 examples held out, which have no test split.
"""

from dpojax.config import LossConfig, MeshConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model="allenai/Llama-3.1-Tulu-3-8B-SFT",
        data=("allenai/llama-3.1-tulu-3-8b-preference-mixture",),
        test_size=1_000,
        max_length=2048,
        loss=LossConfig(name="dpo_norm", beta=5.0),
        reference="precomputed",
        batch_size=128,
        epochs=1,
        evaluate_every=400,
        save_every=400,
        compute_dtype="bfloat16",
        remat="full",
        mesh=MeshConfig(data=1, fsdp=32),
        optimizer=OptimizerConfig(
            learning_rate=5e-7, schedule="linear", warmup_steps=0.1
        ),
    )
