"""Every field of TRL's configurations, and what becomes of it here.

The table of the page "From TRL" is printed from it, and a conversion looks each key up
in it, so neither can know a field that the other does not. Knows no recipe.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Row(NamedTuple):
    """One field."""

    outcome: Literal["mapped", "reported", "refused"]
    text: str  # our setting; why it changes nothing; or why it cannot be
    settled_by: tuple[str, ...] = ()  # flags that answer a refusal
    neutral: tuple[Any, ...] = (None, False)  # values that ask for nothing


def _mapped(**texts: str) -> dict[str, Row]:
    return {name: Row("mapped", text) for name, text in texts.items()}


def _reported(reason: str, listed: str) -> dict[str, Row]:
    return {name: Row("reported", reason) for name in listed.split()}


def _refused(
    reason: str,
    listed: str,
    *,
    flags: tuple[str, ...] = (),
    neutral: tuple[Any, ...] = (),
) -> dict[str, Row]:
    row = Row("refused", reason, flags, (None, False, *neutral))
    return dict.fromkeys(listed.split(), row)


_OBJECTIVE = _mapped(
    loss_type="`loss.name`",
    loss_weights="weights in `loss.name`, as 0.8*dpo+0.2*sft",
    beta="`loss.beta`",
    label_smoothing="`loss.label_smoothing`, where TRL's loss uses it",
    discopop_tau="`loss.tau`",
    f_divergence_type="`loss.divergence`",
    f_alpha_divergence_coef="`loss.divergence_alpha`",
    ld_alpha="`loss.ld_alpha`",
    use_weighting="`loss.weighting` aligned",
    rpo_alpha="a term of `loss.name`: + rpo_alpha*sft (TRL up to 0.28)",
    desirable_weight="`loss.desirable_weight`",
    undesirable_weight="`loss.undesirable_weight`",
    cpo_alpha="`loss.alpha` (cpo, cpo_simpo)",
    simpo_gamma="over beta, `loss.gamma_beta_ratio`",
    alpha="`loss.alpha` (alphapo)",
    gamma_beta_ratio="`loss.gamma_beta_ratio` (SimPO's own repository)",
    sft_weight="a term of `loss.name`: + sft_weight*sft (SimPO's own repository)",
    center_rewards_coefficient="`loss.center`",
    completion_only_loss="true: completions are what is scored; false is refused",
    assistant_only_loss="`turns` assistant",
    packing="rows are always shared, and examples do not see each other",
    packing_strategy="how rows are filled; wrapped, which cuts examples, is refused",
    precompute_ref_log_probs="`reference` precomputed",
    sync_ref_model="`moving` tr_dpo",
    ref_model_mixup_alpha="`moving.alpha`",
    ref_model_sync_steps="`moving.every`",
)

_DATA = _mapped(
    dataset_name="`data`",
    dataset_config="`data`: the default configuration; another is refused",
    dataset_configs="as dataset_config",
    dataset_train_split="`train_split`",
    dataset_test_split="`test_split`",
    dataset_mixer="`data` and `data_weights`",
    dataset_splits="`train_split` and `test_split`",
    dataset_mixture="`data`, `data_weights`, `train_split` and `test_size`",
    datasets="`data`, `data_weights` and `train_split`",
    test_split_size="`test_size`",
)

_NETWORK = _mapped(
    model_name_or_path="`model`",
    max_length="`max_length`; without a limit is refused",
    max_seq_length="`max_length` (TRL up to 0.19)",
    bf16="`compute_dtype`; TRL's default is true",
    fp16="refused where true: computing is in bfloat16 or float32",
    use_peft="`lora`",
    lora_r="`lora.rank`",
    lora_alpha="`lora.alpha`",
    lora_dropout="`lora.dropout`; off where disable_dropout is on",
    lora_target_modules="`lora.targets`; must be named",
    use_rslora="`lora.scaling` rslora",
    use_dora="`lora.kind` dora",
    load_in_4bit="`lora.base` nf4",
    load_in_8bit="`lora.base` int8",
    bnb_4bit_quant_type="`lora.base`; only nf4",
)

_COURSE = _mapped(
    per_device_train_batch_size="`batch_size`, times accumulation and --trl-processes",
    gradient_accumulation_steps="`microbatches`, and a factor of `batch_size`",
    num_train_epochs="`epochs`",
    max_steps="`steps`",
    learning_rate="`optimizer.learning_rate`",
    lr_scheduler_type="`optimizer.schedule`: linear, cosine or constant",
    warmup_steps="`optimizer.warmup_steps`",
    warmup_ratio="`optimizer.warmup_steps`, a share",
    optim="`optimizer.name` and `optimizer.moments`",
    weight_decay="`optimizer.weight_decay`",
    adam_beta1="`optimizer.beta1`",
    adam_beta2="`optimizer.beta2`",
    adam_epsilon="`optimizer.epsilon`",
    max_grad_norm="`optimizer.max_grad_norm`",
    seed="`seed`; the order it gives is another one",
    logging_steps="`log_every`",
    eval_strategy="`evaluate_every`, where in steps",
    eval_steps="`evaluate_every`",
    save_strategy="`save_every`, where in steps",
    save_steps="`save_every`",
    save_total_limit="`keep_last`",
    output_dir="`output`",
    report_to="`track`: tensorboard, wandb, trackio",
)

_REPORTED = {
    **_reported(
        "how memory and time are spent; the result is the same. Here: --remat, --fit, "
        "--offload, --attention, --chunk-size",
        "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
        "activation_checkpointing_kwargs activation_offloading "
        "attn_implementation use_flash_attention_2 torch_compile torch_compile_backend "
        "torch_compile_mode use_liger_kernel liger_kernel_config use_cache "
        "torch_empty_cache_steps padding_free pad_to_multiple_of "
        "precompute_ref_batch_size per_device_eval_batch_size eval_accumulation_steps "
        "bf16_full_eval fp16_full_eval tf32 use_num_logits_to_keep use_logits_to_keep "
        "bnb_4bit_quant_storage use_bnb_nested_quant",
    ),
    **_reported(
        "how devices and processes are laid out. Here: --mesh and --distributed",
        "fsdp fsdp_config deepspeed parallelism_config accelerator_config ddp_timeout "
        "ddp_backend ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
        "ddp_find_unused_parameters local_rank use_cpu average_tokens_across_devices "
        "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap ignore_bias_buffers",
    ),
    **_reported(
        "how data is read and kept; examples are the same",
        "dataset_num_proc preprocessing_num_workers dataset_streaming streaming "
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context "
        "dataloader_in_order remove_unused_columns label_names length_column_name "
        "eval_packing padding_value pad_token label_pad_token_id",
    ),
    **_reported(
        "an epoch sees every example once, in an order of dpojax's own",
        "train_sampling_strategy group_by_length shuffle_dataset dataloader_drop_last "
        "data_seed full_determinism",
    ),
    **_reported(
        "what is shown and where it goes. Here: `dpojax train --help`",
        "run_name project trackio_space_id trackio_bucket_id "
        "trackio_static_space_id log_level log_level_replica log_on_each_node "
        "logging_strategy logging_first_step logging_dir logging_nan_inf_filter "
        "disable_tqdm include_num_input_tokens_seen include_tokens_per_second "
        "skip_memory_metrics debug eval_on_start eval_delay do_train do_eval "
        "do_predict prediction_loss_only include_for_metrics "
        "include_inputs_for_metrics batch_eval_metrics "
        "eval_do_concat_batches eval_use_gather_object generate_during_eval",
    ),
    **_reported(
        "dpojax publishes nothing; `dpojax export` writes a directory to upload",
        "push_to_hub hub_token hub_private_repo hub_model_id hub_model_revision "
        "hub_revision hub_strategy hub_always_push push_to_hub_revision",
    ),
    **_reported(
        "how checkpoints are written. Here: always resumable, never over another run; "
        "--resume continues one, and the best one is kept beside the last",
        "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint "
        "resume_from_checkpoint ignore_data_skip overwrite_output_dir "
        "restore_callback_states_from_checkpoint load_best_model_at_end "
        "metric_for_best_model greater_is_better",
    ),
    **_reported(
        "weights are kept in float32 and computed with in --compute-dtype: a bfloat16 "
        "weight does not move at 5e-7. A LoRA's base: --lora.base",
        "dtype torch_dtype",
    ),
    **_reported(
        "no code that comes with a model is run", "trust_remote_code lora_task_type"
    ),
    **_reported(
        "too long examples lose their prompt's beginning, then their completions' ends "
        "(--too-long); TRL cuts the whole from its end (up to 0.28: prompts to "
        "max_prompt_length first). Shorter ones are the same",
        "truncation_mode max_prompt_length max_target_length max_completion_length",
    ),
    **_reported("models are causal ones", "is_encoder_decoder"),
    **_reported("columns have the names that `--columns` gives", "dataset_text_field"),
}

_REFUSED = {
    **_refused(
        "dpojax reads a name's newest files; download that revision and name the "
        "directory by --model",
        "model_revision",
        flags=("--model",),
        neutral=("main",),
    ),
    **_refused(
        "the template is the tokenizer's; write it there and name the directory by "
        "--model",
        "chat_template chat_template_path",
        flags=("--model",),
    ),
    **_refused(
        "the end-of-sequence token is the tokenizer's; set it there and name the "
        "directory by --model",
        "eos_token",
        flags=("--model",),
    ),
    **_refused(
        "how the model is made is not a setting of dpojax",
        "model_init_kwargs ref_model_init_kwargs",
        flags=("--model",),
        neutral=({},),
    ),
    **_refused(
        "adapters are the policy's; give another reference by --reference",
        "model_adapter_name ref_adapter_name force_use_ref_model",
        flags=("--reference",),
    ),
    **_refused(
        "a loss without a reference has a name of its own: cpo, simpo, orpo",
        "reference_free",
        flags=("--loss",),
    ),
    **_refused(
        "only whole projections have adapters",
        "lora_modules_to_save lora_target_parameters",
        flags=("--lora.targets",),
        neutral=([],),
    ),
    **_refused(
        "shaped otherwise than linear, cosine and constant are",
        "lr_scheduler_kwargs",
        flags=("--optimizer.schedule",),
        neutral=({},),
    ),
    **_refused(
        "settings of the optimiser that dpojax's does not have",
        "optim_args optim_target_modules",
        flags=("--optimizer.name",),
    ),
    **_refused("the embeddings get no noise", "neftune_noise_alpha", neutral=(0,)),
    **_refused(
        "this smoothing is of the cross-entropy, which is not smoothed here",
        "label_smoothing_factor",
        neutral=(0, 0.0),
    ),
    **_refused(
        "a batch's size is the setting's; --fit finds microbatches",
        "auto_find_batch_size",
    ),
    **_refused(
        "the weight is the model's own router_aux_loss_coef, in its config.json",
        "router_aux_loss_coef",
    ),
    **_refused(
        "the data is prepared by dpojax's own rules", "dataset_kwargs", neutral=({},)
    ),
    **_refused("environment variables are set by whoever starts the command", "env"),
    **_refused("the model's tools are the data's column tools", "tools"),
    "disable_dropout": Row(
        "refused",
        "the model's own dropout is not there; only --lora.dropout",
        (),
        (None, True),
    ),
}

FIELDS: Mapping[str, Row] = {
    **_OBJECTIVE,
    **_DATA,
    **_NETWORK,
    **_COURSE,
    **_REPORTED,
    **_REFUSED,
}

# Names that fields had before, and now.
RENAMED = {"evaluation_strategy": "eval_strategy"}
