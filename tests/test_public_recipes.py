"""The keys of twelve public recipes: each has an outcome, and what is refused is named.

Keys are those of the files of the alignment handbook at 925acdf, of SimPO's repository
at 1b3e8f3 and of TRL at f2cd577; values are ours, in their manner.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from dpojax.from_trl.convert import convert
from dpojax.from_trl.recipe import Recipe
from dpojax.from_trl.table import RENAMED
from dpojax.prepare import make_configured_loss

_COMMON = """
bf16 gradient_accumulation_steps gradient_checkpointing learning_rate logging_steps
lr_scheduler_type model_name_or_path num_train_epochs output_dir
per_device_train_batch_size save_strategy seed torch_dtype
"""

RECIPES = {
    "alignment-handbook, zephyr-7b-beta/dpo/config_full.yaml": _COMMON
    + """
beta dataset_mixture dataset_num_proc do_eval eval_steps eval_strategy
gradient_checkpointing_kwargs hub_model_id log_level max_length max_prompt_length
optim per_device_eval_batch_size push_to_hub save_steps save_total_limit
warmup_ratio
""",
    "alignment-handbook, zephyr-7b-beta/dpo/config_qlora.yaml": _COMMON
    + """
attn_implementation beta dataset_mixer dataset_num_proc dataset_splits do_eval
eval_steps eval_strategy gradient_checkpointing_kwargs hub_model_id load_in_4bit
log_level lora_alpha lora_dropout lora_r lora_target_modules max_length
max_prompt_length optim per_device_eval_batch_size push_to_hub save_steps
save_total_limit use_peft warmup_ratio
""",
    "alignment-handbook, zephyr-7b-beta/sft/config_full.yaml": _COMMON
    + """
attn_implementation chat_template dataset_mixture dataset_num_proc do_eval
eval_strategy gradient_checkpointing_kwargs hub_model_id hub_strategy log_level
logging_strategy max_seq_length max_steps model_revision overwrite_output_dir
per_device_eval_batch_size push_to_hub remove_unused_columns report_to save_steps
save_total_limit warmup_ratio
""",
    "alignment-handbook, constitutional-ai/dpo/config_anthropic.yaml": _COMMON
    + """
beta dataset_mixture dataset_num_proc do_eval do_train eval_steps eval_strategy
hub_model_id log_level max_length max_prompt_length optim per_device_eval_batch_size
push_to_hub save_steps save_total_limit warmup_ratio
""",
    "alignment-handbook, pref_align_scan/dpo/config_openhermes.yaml": _COMMON
    + """
beta dataset_mixture dataset_num_proc do_eval do_train eval_steps eval_strategy
gradient_checkpointing_kwargs hub_model_id hub_model_revision loss_type
max_prompt_length optim per_device_eval_batch_size save_steps save_total_limit
warmup_ratio
""",
    "alignment-handbook, smollm2/dpo/config.yaml": _COMMON
    + """
beta dataset_mixture dataset_num_proc do_eval eval_steps eval_strategy
gradient_checkpointing_kwargs hub_model_id hub_private_repo log_level max_length
max_prompt_length optim per_device_eval_batch_size push_to_hub report_to
warmup_ratio
""",
    "alignment-handbook, smollm3/dpo/apo.yaml": _COMMON
    + """
attn_implementation beta dataset_mixture dataset_num_proc do_eval eval_strategy
gradient_checkpointing_kwargs hub_strategy log_level logging_strategy loss_type
lr_scheduler_kwargs max_grad_norm max_length model_revision overwrite_output_dir
padding_free push_to_hub report_to run_name save_steps save_total_limit
trust_remote_code use_liger_kernel warmup_ratio
""",
    "alignment-handbook, zephyr-141b-A35b/orpo/config_full.yaml": _COMMON
    + """
attn_implementation beta chat_template dataset_name dataset_num_proc
dataset_train_split gradient_checkpointing_kwargs hub_model_id log_level max_length
max_prompt_length model_revision optim push_to_hub report_to warmup_steps
""",
    "alignment-handbook, starchat2-15b/dpo/config_v0.1.yaml": _COMMON
    + """
beta dataset_mixture dataset_num_proc do_eval eval_steps eval_strategy
gradient_checkpointing_kwargs hub_model_id log_level max_length max_prompt_length
optim per_device_eval_batch_size push_to_hub report_to warmup_ratio
""",
    "SimPO, training_configs/llama-3-8b-instruct-simpo.yaml": _COMMON
    + """
attn_implementation beta dataset_mixer dataset_splits do_eval eval_steps
evaluation_strategy gamma_beta_ratio gradient_checkpointing_kwargs hub_model_id
log_level max_length max_prompt_length optim per_device_eval_batch_size
preprocessing_num_workers push_to_hub report_to run_name save_steps save_total_limit
warmup_ratio
""",
    "SimPO, training_configs/gemma-2-9b-it-simpo.yaml": _COMMON
    + """
attn_implementation beta chat_template dataset_mixer dataset_splits do_eval
eval_steps evaluation_strategy gamma_beta_ratio gradient_checkpointing_kwargs
hub_model_id log_level max_length max_prompt_length optim per_device_eval_batch_size
preprocessing_num_workers push_to_hub report_to run_name save_steps save_total_limit
warmup_ratio
""",
    "TRL, examples/cli_configs/example_config.yaml": """
dataset_name learning_rate lr_scheduler_type model_name_or_path report_to
""",
}

_SPLITS = [
    {"id": "org/pairs", "config": "default", "split": split, "weight": 1.0}
    for split in ("train_prefs", "test_prefs")
]
VALUES: dict[str, Any] = {
    "attn_implementation": "flash_attention_2",
    "beta": 0.05,
    "bf16": True,
    "chat_template": "{% for one in messages %}{{ one['content'] }}{% endfor %}",
    "dataset_mixer": {"org/pairs": 1.0},
    "dataset_mixture": {"datasets": _SPLITS, "test_split_size": 1000, "seed": 0},
    "dataset_name": "org/pairs",
    "dataset_num_proc": 12,
    "dataset_splits": ["train_prefs", "test_prefs"],
    "dataset_train_split": "train",
    "do_eval": True,
    "do_train": True,
    "eval_steps": 100,
    "eval_strategy": "steps",
    "evaluation_strategy": "steps",
    "gamma_beta_ratio": 0.5,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "run",
    "hub_model_revision": "v1.0",
    "hub_private_repo": True,
    "hub_strategy": "every_save",
    "learning_rate": "5.0e-7",
    "load_in_4bit": True,
    "log_level": "info",
    "logging_steps": 10,
    "logging_strategy": "steps",
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_r": 16,
    "lora_target_modules": ["q_proj", "v_proj"],
    "loss_type": "sigmoid",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.2,
    "max_length": 1024,
    "max_prompt_length": 512,
    "max_seq_length": 2048,
    "max_steps": -1,
    "model_name_or_path": "org/model",
    "model_revision": "main",
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "output_dir": "data/run",
    "overwrite_output_dir": True,
    "padding_free": True,
    "per_device_eval_batch_size": 8,
    "per_device_train_batch_size": 4,
    "preprocessing_num_workers": 12,
    "push_to_hub": True,
    "remove_unused_columns": True,
    "report_to": ["tensorboard", "wandb"],
    "run_name": "run",
    "save_steps": 100,
    "save_strategy": "steps",
    "save_total_limit": 1,
    "seed": 42,
    "torch_dtype": "bfloat16",
    "trust_remote_code": True,
    "use_liger_kernel": True,
    "use_peft": True,
    "warmup_ratio": 0.1,
    "warmup_steps": 100,
}
# By key, the flag that settles its refusal.
REFUSED = {
    "chat_template": "--model",
    "dataset_mixture": "--data",
    "lr_scheduler_kwargs": "--optimizer.schedule",
}


def trainer_of(name: str) -> str:
    for part in ("orpo", "simpo", "dpo"):
        if part in name:
            return part
    return "sft"


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_a_public_recipe_has_an_outcome(name: str):
    keys = RECIPES[name].split()
    recipe = Recipe(Path("recipe.yaml"), {key: VALUES[key] for key in keys})
    refused = {key: flag for key, flag in REFUSED.items() if key in keys}
    how = {"trainer": trainer_of(name), "processes": 8}
    if refused:
        with pytest.raises(ValueError) as error:
            convert(recipe, **how)
        told = str(error.value).split("taken over as it is. ")[1]
        assert set(re.findall(r"(?:^|; )(\w+): ", told)) == set(refused)
        assert all(flag in told for flag in refused.values())
    made = convert(recipe, **how, settled=tuple(refused.values()))
    assert set(made.outcomes) == {RENAMED.get(key, key) for key in keys}
    assert all(made.outcomes.values())
    make_configured_loss(made.config.loss)
    asked = VALUES["report_to"] if "report_to" in keys else []
    assert list(made.config.track) == asked
