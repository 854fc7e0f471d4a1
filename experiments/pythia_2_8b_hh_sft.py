"""Imitate HH's chosen answers with Pythia-2.8B: the reference of `pythia_2_8b_hh_dpo`.

Not run here: the tests build it. Published: 1 h 30 on four A100 of 80 GB.
Command: dpojax train experiments/pythia_2_8b_hh_sft.py --output runs/pythia-2.8b-hh-sft
Slice: v5e:2x4, 8 chips in one worker: fsdp 8, one microbatch, layers rematerialised.
Plan: dpojax plan experiments/pythia_2_8b_hh_sft.py --topology v5e:2x4
--model experiments/shapes/pythia-2.8b
--prompt-tokens 128 --completion-tokens 80 --spread 0.5
Sources: Rafailov et al. 2023, arXiv:2305.18290, section 6, and the README and
`config/config.yaml` of eric-mitchell/direct-preference-optimization: model, data, one
epoch, batches of 64, 512 tokens, RMSprop at a constant 5e-7 after 150 steps of warm-up,
gradients clipped at 10.
"""

from dpojax.config import LossConfig, MeshConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model="EleutherAI/pythia-2.8b",
        data=("Anthropic/hh-rlhf",),
        max_length=512,
        loss=LossConfig(name="sft"),
        batch_size=64,
        epochs=1,
        evaluate_every=400,
        save_every=400,
        compute_dtype="bfloat16",
        remat="full",
        mesh=MeshConfig(data=1, fsdp=8),
        optimizer=OptimizerConfig(
            name="rmsprop",
            learning_rate=5e-7,
            schedule="constant",
            warmup_steps=150,
            max_grad_norm=10.0,
        ),
    )
