"""Qwen2.5-0.5B-Instruct with adapters, on a single chip.

Not run here: the tests build it.
Command: dpojax train experiments/qwen2_5_0_5b_lora_dpo.py --output DIR
Slice: v5e:1x1, one chip: no mesh, one microbatch, layers rematerialised; the base in
bfloat16 is the reference too.
Plan: dpojax plan experiments/qwen2_5_0_5b_lora_dpo.py --topology v5e:1x1
--model experiments/shapes/Qwen2.5-0.5B-Instruct
--prompt-tokens 192 --completion-tokens 320 --spread 0.5
Sources: the LoRA command in TRL's `trl/scripts/dpo.py`, there for Qwen2: data, one
epoch, batches of 2 x 8 accumulated, rank 32, alpha 16, AdamW, 5e-6. What the command
leaves out, by TRL's and PEFT's defaults: beta 0.1, 1,024 tokens, a linear schedule
without warm-up, adapters of queries and values.
"""

from dpojax.config import (
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)


def config() -> TrainConfig:
    return TrainConfig(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        data=("trl-lib/ultrafeedback_binarized",),
        max_length=1024,
        loss=LossConfig(name="dpo", beta=0.1),
        lora=LoraConfig(
            rank=32, alpha=16.0, targets=("q_proj", "v_proj"), base="bfloat16"
        ),
        batch_size=16,
        epochs=1,
        evaluate_every=400,
        save_every=400,
        compute_dtype="bfloat16",
        remat="full",
        mesh=MeshConfig(data=1),
        optimizer=OptimizerConfig(
            learning_rate=5e-6, schedule="linear", warmup_steps=0
        ),
    )
