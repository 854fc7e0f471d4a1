"""Llama-3-Instruct-8B-SimPO: no reference, rewards averaged over tokens.

Not run here: the tests build it. Published, before and after: AlpacaEval 2
(length-controlled) 26.0 and 44.7, Arena-Hard 22.3 and 33.8.
Command: dpojax train experiments/llama3_8b_simpo.py --distributed auto --output DIR
Slice: v5e:4x8, 32 chips in 8 workers: fsdp 32, one microbatch, layers rematerialised.
Plan: dpojax plan experiments/llama3_8b_simpo.py --topology v5e:4x8
--model experiments/shapes/Meta-Llama-3-8B-Instruct
--prompt-tokens 256 --completion-tokens 448 --spread 0.5
Sources: Meng et al. 2024, arXiv:2405.14734, and `llama-3-8b-instruct-simpo.yaml` in
princeton-nlp/SimPO: model, data and splits, beta 2.5, gamma over beta 0.55, one epoch,
batches of 128, 2,048 tokens, AdamW, a cosine from 1e-6 with a tenth of warm-up. The
learning rate matters most: at 1e-5 the model repeats itself. Prompts are cut to half of
max_length here, and to 1,800 tokens there.
"""

from dpojax.config import LossConfig, MeshConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        data=("princeton-nlp/llama3-ultrafeedback",),
        max_length=2048,
        loss=LossConfig(name="simpo", beta=2.5, gamma_beta_ratio=0.55),
        batch_size=128,
        epochs=1,
        evaluate_every=400,
        save_every=400,
        compute_dtype="bfloat16",
        remat="full",
        mesh=MeshConfig(data=1, fsdp=32),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, schedule="cosine", warmup_steps=0.1
        ),
    )
