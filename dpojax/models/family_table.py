"""The families of models: what each reads of its config, and what it never has.

A row says which fields of the decoder a family sets, from which keys, and what
transformers takes where a key is absent. How rows are used is `families.py`'s concern.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpojax.models import weight_names
from dpojax.models.rope_settings import RopeSettings
from dpojax.models.rotary import LongRope
from dpojax.models.shape import ExpertShape

Settings = Mapping[str, Any]
Fields = dict[str, Any]  # of `DecoderConfig`


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


def _windows(settings: Settings, rule: Callable[[int], bool]) -> Fields:
    """Window and which layers have it: as listed or, where nothing is, by a rule."""
    num_layers = settings["num_hidden_layers"]
    types = settings.get("layer_types")
    if types is None:
        windowed = tuple(rule(layer) for layer in range(num_layers))
    else:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != num_layers:
            raise ValueError(
                f"config.json has layer_types {types}; dpojax reads one for each of "
                f"{num_layers} layers, 'full_attention' or 'sliding_attention'."
            )
        windowed = tuple(kind == "sliding_attention" for kind in types)
    switched_on = settings.get("use_sliding_window", True)
    window = settings.get("sliding_window") if switched_on else None
    if window is None and types is not None and any(windowed):
        raise ValueError(
            "config.json has layers with sliding attention but no window; set "
            "sliding_window, and use_sliding_window where the family has it."
        )
    if window is None or not any(windowed):
        return {}
    return {"window": window, "window_layers": None if all(windowed) else windowed}


def _llama(settings: Settings, rope: RopeSettings) -> Fields:
    return {}


def _qwen(settings: Settings, rope: RopeSettings) -> Fields:
    first = settings["max_window_layers"]
    return _windows(settings, lambda layer: layer >= first)


def _qwen2(settings: Settings, rope: RopeSettings) -> Fields:
    return {"qkv_bias": True} | _qwen(settings, rope)


def _qwen3(settings: Settings, rope: RopeSettings) -> Fields:
    return {"query_key_norm": "head"} | _qwen(settings, rope)


def _mistral(settings: Settings, rope: RopeSettings) -> Fields:
    return _windows(settings, lambda layer: True)


def _mixtral(settings: Settings, rope: RopeSettings) -> Fields:
    experts = _experts(settings, settings["intermediate_size"], renormalised=True)
    return {"experts": experts} | _mistral(settings, rope)


def _qwen3_moe(settings: Settings, rope: RopeSettings) -> Fields:
    step, dense = settings["decoder_sparse_step"], settings["mlp_only_layers"] or ()
    if step != 1 or any(layer < settings["num_hidden_layers"] for layer in dense):
        raise ValueError(
            f"config.json has decoder_sparse_step = {step} and mlp_only_layers = "
            f"{list(dense)}; dpojax supports experts in every layer: 1 and []."
        )
    experts = _experts(
        settings,
        settings["moe_intermediate_size"],
        renormalised=settings["norm_topk_prob"],
    )
    windows = _windows(settings, lambda layer: True)
    return {"query_key_norm": "head", "experts": experts} | windows


def _experts(settings: Settings, width: int, *, renormalised: bool) -> ExpertShape:
    number, per_token = settings["num_experts"], settings["num_experts_per_tok"]
    if not 1 <= per_token <= number:
        raise ValueError(
            f"config.json sends each token to {per_token} of {number} experts "
            "(num_experts_per_tok); the number must be between 1 and all of them."
        )
    return ExpertShape(
        number=number, per_token=per_token, width=width, renormalised=renormalised
    )


def _smollm3(settings: Settings, rope: RopeSettings) -> Fields:
    num_layers = settings["num_hidden_layers"]
    turns = settings.get("no_rope_layers")  # 1 where there is one, in spite of the name
    if turns is None:
        interval = settings["no_rope_layer_interval"]
        turns = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if len(turns) < num_layers:
        raise ValueError(
            f"config.json has no_rope_layers for {len(turns)} of {num_layers} layers; "
            "give one number for each."
        )
    rotary_layers = tuple(bool(turn) for turn in turns[:num_layers])
    windows = _windows(settings, lambda layer: not rotary_layers[layer])
    return {"rotary_layers": rotary_layers} | windows


def _granite(settings: Settings, rope: RopeSettings) -> Fields:
    return {
        "embedding_scale": float(settings["embedding_multiplier"]),
        "residual_scale": float(settings["residual_multiplier"]),
        "attention_scale": float(settings["attention_multiplier"]),
        "logit_scale": 1 / float(settings["logits_scaling"]),
    }


def _olmo2(settings: Settings, rope: RopeSettings) -> Fields:
    return {"arrangement": "post", "query_key_norm": "projection"}


def _olmo3(settings: Settings, rope: RopeSettings) -> Fields:
    windows = _windows(settings, lambda layer: (layer + 1) % 4 != 0)
    return _olmo2(settings, rope) | windows | {"window_rope": rope.window}


def _phi3(settings: Settings, rope: RopeSettings) -> Fields:
    if not isinstance(rope.whole.scaling, LongRope | None):
        raise ValueError(
            "config.json scales rotary positions of Phi-3 by another kind than "
            "'default' and 'longrope' ('su' and 'yarn' are its older names)."
        )
    return _partial(settings, rope.share) | _windows(settings, lambda layer: True)


def _partial(settings: Settings, share: float | None) -> Fields:
    """How many dimensions of a head turn, from a share."""
    if share is None:
        share = settings["partial_rotary_factor"]
    width, num_heads = settings["hidden_size"], settings["num_attention_heads"]
    return {"rotary_dimension": int(width // num_heads * share)}


def _gemma(settings: Settings, rope: RopeSettings) -> Fields:
    return {
        "norm": "rms_from_one",
        "activation": "gelu_tanh",
        "embedding_scale": settings["hidden_size"] ** 0.5,
    }


def _gemma2(settings: Settings, rope: RopeSettings) -> Fields:
    added = {
        "arrangement": "both",
        "attention_scale": settings["query_pre_attn_scalar"] ** -0.5,
        "attention_cap": settings.get("attn_logit_softcapping"),
        "logit_cap": settings.get("final_logit_softcapping"),
    }
    windows = _windows(settings, lambda layer: layer % 2 == 0)
    return _gemma(settings, rope) | added | windows


def _gemma3(settings: Settings, rope: RopeSettings) -> Fields:
    pattern = settings["sliding_window_pattern"]
    windows = _windows(settings, lambda layer: (layer + 1) % pattern != 0)
    added = {"query_key_norm": "head", "window_rope": rope.window}
    return (
        _gemma2(settings, rope)
        | {"window": None, "window_layers": None}
        | added
        | windows
    )


_GPT_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}


def _gpt(settings: Settings) -> Fields:
    """What the families of GPT share."""
    return {
        "mlp_width": settings.get("intermediate_size") or 4 * settings["hidden_size"],
        "norm": "layer",
        "mlp": "plain",
        "activation": _GPT_ACTIVATIONS[settings["hidden_act"]],
        "mlp_bias": True,
    }


def _gpt2(settings: Settings, rope: RopeSettings) -> Fields:
    biases = {"qkv_bias": True, "output_bias": True}
    return _gpt(settings) | biases | {"positions": "learned"}


def _gpt_neox(settings: Settings, rope: RopeSettings) -> Fields:
    arrangement = "parallel" if settings["use_parallel_residual"] else "pre"
    share = settings["rotary_pct"] if rope.share is None else rope.share
    return (
        _gpt(settings)
        | _partial(settings, share)
        | {"qkv_bias": True, "output_bias": True, "arrangement": arrangement}
    )


def _gptj(settings: Settings, rope: RopeSettings) -> Fields:
    return _gpt(settings) | {
        "arrangement": "parallel_one_norm",
        "rotary_dimension": settings["rotary_dim"],
        "rotary_pairs": "neighbours",
        "head_bias": True,
    }


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
    "activation_function": tuple(_GPT_ACTIVATIONS),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    # transformers does not read them: GPT-J's base is always 10,000.
    "rope_theta": (None,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
}

FAMILIES = {
    "llama": Family("Llama", weight_names.LLAMA, _llama),
    "qwen2": Family("Qwen2", weight_names.LLAMA, _qwen2, _QWEN_KEYS, _QWEN_DEFAULTS),
    "qwen3": Family(
        "Qwen3",
        weight_names.LLAMA,
        _qwen3,
        _QWEN_KEYS,
        _QWEN_DEFAULTS | {"head_dim": 128},
    ),
    "mistral": Family(
        "Mistral",
        weight_names.LLAMA,
        _mistral,
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
        _mixtral,
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
        _qwen3_moe,
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
        _smollm3,
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
        _granite,
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
        "Olmo2", weight_names.OLMO2, _olmo2, defaults={"rms_norm_eps": 1e-5}
    ),
    "olmo3": Family(
        "Olmo3",
        weight_names.OLMO2,
        _olmo3,
        _WINDOW,
        {"rms_norm_eps": 1e-5, "sliding_window": 4096},
        theta=500_000.0,
        window_theta=500_000.0,  # unscaled, and whatever rope_theta says
    ),
    "phi3": Family(
        "Phi3",
        weight_names.PHI3,
        _phi3,
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
        _gemma,
        defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 16},
        only=_GEMMA_ONLY,
    ),
    "gemma2": Family(
        "Gemma2",
        weight_names.GEMMA2,
        _gemma2,
        _GEMMA2_KEYS,
        _GEMMA2_DEFAULTS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        only=_GEMMA_ONLY,
    ),
    "gemma3_text": Family(
        "Gemma3",
        weight_names.GEMMA2,
        _gemma3,
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
        _gpt2,
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
        _gpt_neox,
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
        only={"hidden_act": tuple(_GPT_ACTIVATIONS), "attention_bias": (True,)},
        renamed={"layer_norm_eps": "rms_norm_eps", "rotary_emb_base": "rope_theta"},
        fused_by_head=True,
    ),
    "gptj": Family(
        "GPTJ",
        weight_names.GPTJ,
        _gptj,
        _GPT_INERT | {"rotary_dim", "rotary"},
        _GPT_DEFAULTS | {"rotary_dim": 64},
        only=_GPT_ONLY,
        renamed=_GPT_RENAMED,
    ),
}
