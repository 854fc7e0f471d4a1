"""Names of weights in Hugging Face's files, family by family.

Our path of a parameter to their name. A `{layer}` stands where a stacked array is one
tensor per layer. Kernels are transposed there, ``[outputs, inputs]``, unless the family
says otherwise; paths that share a name share its tensor, in the order given here.
"""

from collections.abc import Mapping

Names = Mapping[str, str]


def _projections(names: Names) -> dict[str, str]:
    """Kernel and bias of each projection of a layer."""
    return {
        f"blocks/{ours}/{kind}": f"{theirs}.{their_kind}"
        for ours, theirs in names.items()
        for kind, their_kind in {"kernel": "weight", "bias": "bias"}.items()
    }


def _layer_norms(names: Names) -> dict[str, str]:
    """Scale and bias of each LayerNorm."""
    return {
        f"{ours}/{kind}": f"{theirs}.{their_kind}"
        for ours, theirs in names.items()
        for kind, their_kind in {"scale": "weight", "bias": "bias"}.items()
    }


_HEADS = {
    "output/embedding": "lm_head.weight",
    "output_bias": "lm_head.bias",
    "score/embedding": "score.weight",
}
LLAMA = (
    _HEADS
    | {
        "embedding/embedding": "model.embed_tokens.weight",
        "norm/scale": "model.norm.weight",
        "blocks/attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
        "blocks/mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
        "blocks/attention/query_norm/scale": (
            "model.layers.{layer}.self_attn.q_norm.weight"
        ),
        "blocks/attention/key_norm/scale": (
            "model.layers.{layer}.self_attn.k_norm.weight"
        ),
    }
    | _projections(
        {
            "attention/query": "model.layers.{layer}.self_attn.q_proj",
            "attention/key": "model.layers.{layer}.self_attn.k_proj",
            "attention/value": "model.layers.{layer}.self_attn.v_proj",
            "attention/output": "model.layers.{layer}.self_attn.o_proj",
            "mlp/gate": "model.layers.{layer}.mlp.gate_proj",
            "mlp/up": "model.layers.{layer}.mlp.up_proj",
            "mlp/down": "model.layers.{layer}.mlp.down_proj",
        }
    )
)
_AFTER = {
    "blocks/attention_post_norm/scale": (
        "model.layers.{layer}.post_attention_layernorm.weight"
    ),
    "blocks/mlp_post_norm/scale": (
        "model.layers.{layer}.post_feedforward_layernorm.weight"
    ),
}
OLMO2 = {
    ours: theirs
    for ours, theirs in LLAMA.items()
    if ours not in ("blocks/attention_norm/scale", "blocks/mlp_norm/scale")
} | _AFTER
GEMMA2 = (
    LLAMA
    | {
        "blocks/mlp_norm/scale": (
            "model.layers.{layer}.pre_feedforward_layernorm.weight"
        )
    }
    | _AFTER
)
PHI3 = LLAMA | _projections(
    {
        "attention/query": "model.layers.{layer}.self_attn.qkv_proj",
        "attention/key": "model.layers.{layer}.self_attn.qkv_proj",
        "attention/value": "model.layers.{layer}.self_attn.qkv_proj",
        "mlp/gate": "model.layers.{layer}.mlp.gate_up_proj",
        "mlp/up": "model.layers.{layer}.mlp.gate_up_proj",
    }
)
