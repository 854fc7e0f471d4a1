"""Zephyr-7B-beta: DPO of Mistral-7B's SFT model on UltraFeedback, as in its paper.

Not run here: the tests build it. Published: MT-Bench 7.34 (before DPO 6.64),
AlpacaEval 90.6 (85.65).
Command: dpojax train experiments/zephyr_7b_dpo.py --distributed auto --output DIR
Slice: v5e:4x4, 16 chips in 4 workers: fsdp 16, one microbatch, layers rematerialised.
Plan: dpojax plan experiments/zephyr_7b_dpo.py --topology v5e:4x4
--model experiments/shapes/zephyr-7b-sft-full
--prompt-tokens 192 --completion-tokens 320 --spread 0.5
Sources: Tunstall et al. 2023, arXiv:2310.16944, section 4.3: beta 0.1, three epochs,
batches of 32, AdamW without decay, a linear schedule from 5e-7 with a tenth of warm-up.
Of the alignment handbook's `recipes/zephyr-7b-beta`: the model, the data's splits and
at most 1,024 tokens. The handbook itself takes beta 0.01, one epoch, batches of 128 and
a cosine: `--beta 0.01 --epochs 1 --batch-size 128 --optimizer.schedule cosine`.
"""

from dpojax.config import LossConfig, MeshConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model="alignment-handbook/zephyr-7b-sft-full",
        data=("HuggingFaceH4/ultrafeedback_binarized",),
        train_split="train_prefs",
        test_split="test_prefs",
        max_length=1024,
        loss=LossConfig(name="dpo", beta=0.1),
        batch_size=32,
        epochs=3,
        evaluate_every=400,
        save_every=400,
        compute_dtype="bfloat16",
        remat="full",
        mesh=MeshConfig(data=1, fsdp=16),
        optimizer=OptimizerConfig(
            learning_rate=5e-7, schedule="linear", warmup_steps=0.1
        ),
    )
