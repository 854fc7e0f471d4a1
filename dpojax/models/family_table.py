"""The families of models: what each reads of its config, and what it never has.

A row says which fields of the decoder a family sets, from which keys, and what
transformers takes where a key is absent. How rows are used is `families.py`'s concern.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpojax.models import family_fields as fields
from dpojax.models import weight_names
from dpojax.models.family_fields import Fields, Settings
from dpojax.models.rope_settings import RopeSettings


class Family(NamedTuple):
    """What distinguishes a family."""

    name: str  # what transformers' classes begin with
    names: Mapping[str, str]  # our paths of parameters to tensors
    fields: Callable[[Settings, RopeSettings], Fields]
    keys: frozenset[str] = frozenset()  # read by `fields`, or inert in this family
    defaults: Mapping[str, Any] = {}  # of absent keys
    only: Mapping[str, tuple[Any, ...]] = {}  # keys, and the values that are allowed
    renamed: Mapping[str, str] = {}  # the family's keys to Llama's
    theta: float = 10_000.0  # of absent rope_theta
    window_theta: float | None = None  # in layers with a window, where another
    causal_name: str | None = None  # of causal models' class; None: by `name`
    reward_name: str | None = ""  # of reward models; "": as `name`; None: has none
    transposed: bool = True  # kernels are stored [outputs, inputs]
    fused_by_head: bool = False  # in a fused tensor, each head's parts are together
    rope_names: Mapping[str, str] = {}  # its names of rotary scalings to others' names


_WINDOW = frozenset({"sliding_window", "layer_types"})
_ROUTER_KEYS = frozenset({
    "num_experts", "num_experts_per_tok", "output_router_logits",
    "router_aux_loss_coef",
})  # fmt: skip
_ROUTER_DEFAULTS = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
_ROUTER_RENAMED = {"num_local_experts": "num_experts"}
_QWEN_KEYS = _WINDOW | {"use_sliding_window", "max_window_layers"}
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}

_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
_GEMMA_ONLY = {
    # Gemma's first configs say gelu, and mean its approximation.
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh",),
}
_GEMMA2_KEYS = _WINDOW | {
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GPT_RENAMED = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
_GPT_DEFAULTS = {
    "intermediate_size": None,
    "rms_norm_eps": 1e-5,
    "hidden_act": "gelu_new",
}
# Dropout, and the heads of other tasks.
_GPT_INERT = frozenset({
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "task_specific_params", "reorder_and_upcast_attn",
    "gradient_checkpointing",
})  # fmt: skip
_GPT_ONLY = {
    "activation_function": tuple(fields.GPT_ACTIVATIONS),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    # transformers does not read them: GPT-J's base is always 10,000.
    "rope_theta": (None,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
}

FAMILIES = {
    "llama": Family("Llama", weight_names.LLAMA, fields.llama),
    "qwen2": Family(
        "Qwen2", weight_names.LLAMA, fields.qwen2, _QWEN_KEYS, _QWEN_DEFAULTS
    ),
    "qwen3": Family(
        "Qwen3",
        weight_names.LLAMA,
        fields.qwen3,
        _QWEN_KEYS,
        _QWEN_DEFAULTS | {"head_dim": 128},
    ),
    "mistral": Family(
        "Mistral",
        weight_names.LLAMA,
        fields.mistral,
        _WINDOW,
        {
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
        },
    ),
    "mixtral": Family(
        "Mixtral",
        weight_names.MIXTRAL,
        fields.mixtral,
        _ROUTER_KEYS | {"sliding_window"},
        _ROUTER_DEFAULTS
        | {
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
        },
        only={"router_jitter_noise": (0.0,)},
        renamed=_ROUTER_RENAMED,
        theta=1_000_000.0,
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        weight_names.QWEN3_MOE,
        fields.qwen3_moe,
        _ROUTER_KEYS
        | {
            "sliding_window",
            "use_sliding_window",
            "moe_intermediate_size",
            "norm_topk_prob",
            "decoder_sparse_step",
            "mlp_only_layers",
        },
        _ROUTER_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
        },
        renamed=_ROUTER_RENAMED,
    ),
    "smollm3": Family(
        "SmolLM3",
        weight_names.LLAMA,
        fields.smollm3,
        _WINDOW | {"use_sliding_window", "no_rope_layers", "no_rope_layer_interval"},
        {
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "max_position_embeddings": 32768,
        },
        theta=2_000_000.0,
    ),
    "granite": Family(
        "Granite",
        weight_names.LLAMA,
        fields.granite,
        frozenset(
            {
                "embedding_multiplier",
                "residual_multiplier",
                "attention_multiplier",
                "logits_scaling",
            }
        ),
        {
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        reward_name=None,
    ),
    "olmo2": Family(
        "Olmo2",
        weight_names.OLMO2,
        fields.olmo2,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "olmo3": Family(
        "Olmo3",
        weight_names.OLMO2,
        fields.olmo3,
        _WINDOW,
        {"rms_norm_eps": 1e-5, "sliding_window": 4096},
        theta=500_000.0,
        window_theta=500_000.0,  # unscaled, and whatever rope_theta says
    ),
    "phi3": Family(
        "Phi3",
        weight_names.PHI3,
        fields.phi3,
        frozenset(
            {
                "sliding_window",
                "partial_rotary_factor",
                "resid_pdrop",
                "embd_pdrop",
                "original_max_position_embeddings",
                "auto_map",  # code of the hub that transformers has had since
            }
        ),
        {
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1.0,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        # Of Phi-4-mini's own code.
        only={
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
            "lm_head_bias": (False,),
        },
        rope_names={"su": "longrope", "yarn": "longrope"},
    ),
    "gemma": Family(
        "Gemma",
        weight_names.LLAMA,
        fields.gemma,
        defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 16},
        only=_GEMMA_ONLY,
    ),
    "gemma2": Family(
        "Gemma2",
        weight_names.GEMMA2,
        fields.gemma2,
        _GEMMA2_KEYS,
        _GEMMA2_DEFAULTS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        only=_GEMMA_ONLY,
    ),
    "gemma3_text": Family(
        "Gemma3",
        weight_names.GEMMA2,
        fields.gemma3,
        (_GEMMA2_KEYS - {"attn_logit_softcapping"})
        | {
            "sliding_window_pattern",
            "_sliding_window_pattern",
            "rope_local_base_freq",
        },
        _GEMMA2_DEFAULTS
        | {"sliding_window_pattern": 6, "max_position_embeddings": 131072},
        # transformers reads this cap of attention and does not apply it.
        only=_GEMMA_ONLY | {"attn_logit_softcapping": (None,)},
        theta=1_000_000.0,
        window_theta=10_000.0,
        reward_name="Gemma3Text",
    ),
    "gpt2": Family(
        "GPT2",
        weight_names.GPT2,
        fields.gpt2,
        _GPT_INERT,
        _GPT_DEFAULTS | {"tie_word_embeddings": True, "max_position_embeddings": 1024},
        only=_GPT_ONLY,
        renamed=_GPT_RENAMED,
        causal_name="GPT2LMHeadModel",
        transposed=False,
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        weight_names.GPT_NEOX,
        fields.gpt_neox,
        frozenset(
            {
                "use_parallel_residual",
                "rotary_pct",
                "hidden_dropout",
                "classifier_dropout",
                "is_decoder",
            }
        ),
        {
            "rms_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "rotary_pct": 0.25,
        },
        only={
            "hidden_act": tuple(fields.GPT_ACTIVATIONS),
            "attention_bias": (True,),
        },
        renamed={"layer_norm_eps": "rms_norm_eps", "rotary_emb_base": "rope_theta"},
        fused_by_head=True,
    ),
    "gptj": Family(
        "GPTJ",
        weight_names.GPTJ,
        fields.gptj,
        _GPT_INERT | {"rotary_dim", "rotary"},
        _GPT_DEFAULTS | {"rotary_dim": 64},
        only=_GPT_ONLY,
        renamed=_GPT_RENAMED,
    ),
}
