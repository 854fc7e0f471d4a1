"""SmolLM2-1.7B: DPO on UltraFeedback with the strong constraint that small models want.

Not run here: the tests build it.
Command: dpojax train experiments/smollm2_1_7b_dpo.py --output DIR
Slice: v5e:2x4, 8 chips in one worker: fsdp 8, one microbatch, layers rematerialised.
Plan: dpojax plan experiments/smollm2_1_7b_dpo.py --topology v5e:2x4
--model experiments/shapes/smollm2-1.7B-sft
--prompt-tokens 192 --completion-tokens 320 --spread 0.5
Sources: the alignment handbook's `recipes/smollm2/dpo/config.yaml`: model, data and
splits, beta 0.5, three epochs, batches of 8 devices x 2 x 8 accumulated, 1,024 tokens,
AdamW, a cosine from 1e-6 with a tenth of warm-up. Its sizes of 360M and 135M take two
epochs.
"""

from dpojax.config import LossConfig, MeshConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model="loubnabnl/smollm2-1.7B-sft",
        data=("HuggingFaceH4/ultrafeedback_binarized",),
        train_split="train_prefs",
        test_split="test_prefs",
        max_length=1024,
        loss=LossConfig(name="dpo", beta=0.5),
        batch_size=128,
        epochs=3,
        evaluate_every=100,
        save_every=400,
        compute_dtype="bfloat16",
        remat="full",
        mesh=MeshConfig(data=1, fsdp=8),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, schedule="cosine", warmup_steps=0.1
        ),
    )
