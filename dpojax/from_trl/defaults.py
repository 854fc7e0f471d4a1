"""What TRL 1.16 takes where a recipe is silent, of the fields that are mapped.

Fields that older recipes have stand at what asks for nothing.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

Trainer = Literal["dpo", "kto", "cpo", "simpo", "orpo", "sft", "reward"]
TRAINERS: tuple[str, ...] = get_args(Trainer)

_EVERY = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "warmup_ratio": 0.0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "seed": 42,
    "logging_steps": 10,
    "eval_strategy": "no",
    "eval_steps": None,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "output_dir": None,
    "report_to": "none",
    "model_name_or_path": None,
    "max_length": 1024,
    "max_seq_length": None,
    "bf16": None,
    "fp16": False,
    "disable_dropout": True,
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "use_rslora": False,
    "use_dora": False,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "dataset_name": None,
    "dataset_config": None,
    "dataset_configs": None,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "dataset_mixer": None,
    "dataset_splits": None,
    "dataset_mixture": None,
    "datasets": [],
    "test_split_size": None,
}
_REFERENCE = {
    "precompute_ref_log_probs": False,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
}

_OWN: Mapping[str, Mapping[str, Any]] = {
    "dpo": {
        "loss_type": ["sigmoid"],
        "loss_weights": None,
        "beta": 0.1,
        "label_smoothing": 0.0,
        "discopop_tau": 0.05,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "rpo_alpha": None,
        **_REFERENCE,
    },
    "kto": {
        "loss_type": "kto",
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        **_REFERENCE,
    },
    "cpo": {
        "loss_type": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "cpo_alpha": 1.0,
        "simpo_gamma": 0.5,
        "alpha": 0.0,
    },
    "simpo": {  # of the paper's repository
        "loss_type": "sigmoid",
        "beta": 2.0,
        "gamma_beta_ratio": 0.25,
        "sft_weight": 0.0,
        "label_smoothing": 0.0,
    },
    "orpo": {"beta": 0.1},
    "sft": {
        "learning_rate": 2e-5,
        "loss_type": "nll",
        "completion_only_loss": None,
        "assistant_only_loss": False,
        "packing": False,
        "packing_strategy": "bfd",
    },
    "reward": {"learning_rate": 1e-4, "center_rewards_coefficient": None},
}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    trainer: {**_EVERY, **own} for trainer, own in _OWN.items()
}
# Where None is a value of its own, not the default.
NONE_IS_A_VALUE = frozenset({"max_length"})


def told_by(keys: Mapping[str, Any]) -> str | None:
    """The trainer that alone has one of these keys, if it is one."""
    found = {
        trainer
        for trainer, own in _OWN.items()
        for key in keys
        if key in own and sum(key in other for other in _OWN.values()) == 1
    }
    return found.pop() if len(found) == 1 else None
