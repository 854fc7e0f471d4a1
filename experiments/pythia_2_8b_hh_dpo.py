"""The DPO paper's dialogue: Pythia-2.8B on Anthropic's helpful and harmless pairs.

Not run here: the tests build it. Published: preferred to the chosen answers of the test
set about as often as the best of 128 samples; 2 h 45 on four A100 of 80 GB.
Command: dpojax train experiments/pythia_2_8b_hh_dpo.py --output runs/pythia-2.8b-hh-dpo
after `pythia_2_8b_hh_sft.py`, whose model it starts from.
Slice: v5e:2x4, 8 chips in one worker: fsdp 8, one microbatch, layers rematerialised.
Plan: dpojax plan experiments/pythia_2_8b_hh_dpo.py --topology v5e:2x4
--model experiments/shapes/pythia-2.8b
--prompt-tokens 128 --completion-tokens 80 --spread 0.5
Sources: Rafailov et al. 2023, arXiv:2305.18290, appendix B: beta 0.1, batches of 64,
RMSprop at a constant 1e-6 after 150 steps of warm-up (its code: 5e-7). From the README
and `config/config.yaml` of eric-mitchell/direct-preference-optimization: one epoch, 512
tokens, gradients clipped at 10.
"""

from dpojax.config import LossConfig, MeshConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model="runs/pythia-2.8b-hh-sft/final",
        data=("Anthropic/hh-rlhf",),
        max_length=512,
        loss=LossConfig(name="dpo", beta=0.1),
        batch_size=64,
        epochs=1,
        evaluate_every=400,
        save_every=400,
        compute_dtype="bfloat16",
        remat="full",
        mesh=MeshConfig(data=1, fsdp=8),
        optimizer=OptimizerConfig(
            name="rmsprop",
            learning_rate=1e-6,
            schedule="constant",
            warmup_steps=150,
            max_grad_norm=10.0,
        ),
    )
