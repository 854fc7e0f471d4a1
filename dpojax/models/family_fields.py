"""What each family of models says of its decoder: keys of its config to fields.

A function gives the fields in which a family differs from Llama. Which function is
whose, and what is allowed and absent, stands in `family_table.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dpojax.models.rope_settings import RopeSettings
from dpojax.models.rotary import LongRope
from dpojax.models.setting_kinds import shown
from dpojax.models.shape import ExpertShape

Settings = Mapping[str, Any]
Fields = dict[str, Any]  # of `DecoderConfig`


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
                f"config.json has layer_types {shown(types)}; dpojax reads one for "
                f"each of {num_layers} layers, 'full_attention' or 'sliding_attention'."
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


def llama(settings: Settings, rope: RopeSettings) -> Fields:
    """Nothing beside what every family has."""
    return {}


def _qwen(settings: Settings, rope: RopeSettings) -> Fields:
    first = settings["max_window_layers"]
    return _windows(settings, lambda layer: layer >= first)


def qwen2(settings: Settings, rope: RopeSettings) -> Fields:
    """Biases of queries, keys and values; later layers may have a window."""
    return {"qkv_bias": True} | _qwen(settings, rope)


def qwen3(settings: Settings, rope: RopeSettings) -> Fields:
    """Norms of each head's queries and keys; later layers may have a window."""
    return {"query_key_norm": "head"} | _qwen(settings, rope)


def mistral(settings: Settings, rope: RopeSettings) -> Fields:
    """A window in every layer."""
    return _windows(settings, lambda layer: True)


def mixtral(settings: Settings, rope: RopeSettings) -> Fields:
    """Mistral with experts, whose weights add up to 1."""
    experts = _experts(settings, settings["intermediate_size"], renormalised=True)
    return {"experts": experts} | mistral(settings, rope)


def qwen3_moe(settings: Settings, rope: RopeSettings) -> Fields:
    """Qwen3 with experts of a width of their own, in every layer."""
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


def smollm3(settings: Settings, rope: RopeSettings) -> Fields:
    """Layers without rotary embedding, which may have a window."""
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


def granite(settings: Settings, rope: RopeSettings) -> Fields:
    """Scales of embeddings, residuals, scores and logits."""
    return {
        "embedding_scale": float(settings["embedding_multiplier"]),
        "residual_scale": float(settings["residual_multiplier"]),
        "attention_scale": float(settings["attention_multiplier"]),
        "logit_scale": 1 / float(settings["logits_scaling"]),
    }


def olmo2(settings: Settings, rope: RopeSettings) -> Fields:
    """Norms after attention and MLP, and over all heads' queries and keys."""
    return {"arrangement": "post", "query_key_norm": "projection"}


def olmo3(settings: Settings, rope: RopeSettings) -> Fields:
    """OLMo 2 with a window in three layers of four."""
    windows = _windows(settings, lambda layer: (layer + 1) % 4 != 0)
    return olmo2(settings, rope) | windows | {"window_rope": rope.window}


def phi3(settings: Settings, rope: RopeSettings) -> Fields:
    """Part of a head may turn; a window in every layer."""
    if not isinstance(rope.whole.scaling, LongRope | None):
        raise ValueError(
            "config.json scales rotary positions of Phi-3 by another kind than "
            "'default' and 'longrope' ('su' and 'yarn' are its older names)."
        )
    return _partial(settings, rope.share) | _windows(settings, lambda layer: True)


def _partial(settings: Settings, share: float | None) -> Fields:
    """How many dimensions of a head turn, from a share."""
    if share is None:
        share = float(settings["partial_rotary_factor"])
    width, num_heads = settings["hidden_size"], settings["num_attention_heads"]
    return {"rotary_dimension": int(width // num_heads * share)}


def gemma(settings: Settings, rope: RopeSettings) -> Fields:
    """Scaled embeddings, norms from one, a gated GELU."""
    return {
        "norm": "rms_from_one",
        "activation": "gelu_tanh",
        "embedding_scale": settings["hidden_size"] ** 0.5,
    }


def _optional(number: int | float | None) -> float | None:
    return None if number is None else float(number)


def gemma2(settings: Settings, rope: RopeSettings) -> Fields:
    """Gemma with norms on both sides, soft caps and alternate windows."""
    added = {
        "arrangement": "both",
        "attention_scale": settings["query_pre_attn_scalar"] ** -0.5,
        "attention_cap": _optional(settings.get("attn_logit_softcapping")),
        "logit_cap": _optional(settings.get("final_logit_softcapping")),
    }
    windows = _windows(settings, lambda layer: layer % 2 == 0)
    return gemma(settings, rope) | added | windows


def gemma3(settings: Settings, rope: RopeSettings) -> Fields:
    """Norms of queries and keys instead of caps, and a rotary base for windows."""
    pattern = settings["sliding_window_pattern"]
    windows = _windows(settings, lambda layer: (layer + 1) % pattern != 0)
    added = {"query_key_norm": "head", "window_rope": rope.window}
    return (
        gemma2(settings, rope)
        | {"window": None, "window_layers": None}
        | added
        | windows
    )


GPT_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}


def _gpt(settings: Settings) -> Fields:
    """What the families of GPT share."""
    if settings["hidden_act"] is None:
        raise ValueError(
            "config.json has no activation function; dpojax supports "
            f"{', '.join(GPT_ACTIVATIONS)}."
        )
    return {
        "mlp_width": settings.get("intermediate_size") or 4 * settings["hidden_size"],
        "norm": "layer",
        "mlp": "plain",
        "activation": GPT_ACTIVATIONS[settings["hidden_act"]],
        "mlp_bias": True,
    }


def gpt2(settings: Settings, rope: RopeSettings) -> Fields:
    """Learned positions, biases everywhere."""
    biases = {"qkv_bias": True, "output_bias": True}
    return _gpt(settings) | biases | {"positions": "learned"}


def gpt_neox(settings: Settings, rope: RopeSettings) -> Fields:
    """Part of a head turns; attention and MLP may stand side by side."""
    arrangement = "parallel" if settings["use_parallel_residual"] else "pre"
    share = settings["rotary_pct"] if rope.share is None else rope.share
    return (
        _gpt(settings)
        | _partial(settings, float(share))
        | {"qkv_bias": True, "output_bias": True, "arrangement": arrangement}
    )


def gptj(settings: Settings, rope: RopeSettings) -> Fields:
    """Side by side under one norm; neighbouring dimensions turn."""
    return _gpt(settings) | {
        "arrangement": "parallel_one_norm",
        "rotary_dimension": settings["rotary_dim"],
        "rotary_pairs": "neighbours",
        "head_bias": True,
    }
