"""Names of weights in Hugging Face's files, family by family.

Our path of a parameter to their name. A `{layer}` stands where a stacked array is one
tensor per layer, an `{expert}` where it is one per expert of each layer. Kernels are
transposed there, ``[outputs, inputs]``, unless the family says otherwise; paths that
share a name share its tensor, in the order given here.
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
MIXTRAL = LLAMA | _projections(
    {
        "experts/router": "model.layers.{layer}.block_sparse_moe.gate",
        "experts/gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
        "experts/up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
        "experts/down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
    }
)
QWEN3_MOE = LLAMA | _projections(
    {
        "experts/router": "model.layers.{layer}.mlp.gate",
        "experts/gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj",
        "experts/up": "model.layers.{layer}.mlp.experts.{expert}.up_proj",
        "experts/down": "model.layers.{layer}.mlp.experts.{expert}.down_proj",
    }
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
GPT2 = (
    _HEADS
    | {
        "embedding/embedding": "transformer.wte.weight",
        "position/embedding": "transformer.wpe.weight",
    }
    | _layer_norms(
        {
            "norm": "transformer.ln_f",
            "blocks/attention_norm": "transformer.h.{layer}.ln_1",
            "blocks/mlp_norm": "transformer.h.{layer}.ln_2",
        }
    )
    | _projections(
        {
            "attention/query": "transformer.h.{layer}.attn.c_attn",
            "attention/key": "transformer.h.{layer}.attn.c_attn",
            "attention/value": "transformer.h.{layer}.attn.c_attn",
            "attention/output": "transformer.h.{layer}.attn.c_proj",
            "mlp/up": "transformer.h.{layer}.mlp.c_fc",
            "mlp/down": "transformer.h.{layer}.mlp.c_proj",
        }
    )
)
GPT_NEOX = (
    _HEADS
    | {
        "embedding/embedding": "gpt_neox.embed_in.weight",
        "output/embedding": "embed_out.weight",
    }
    | _layer_norms(
        {
            "norm": "gpt_neox.final_layer_norm",
            "blocks/attention_norm": "gpt_neox.layers.{layer}.input_layernorm",
            "blocks/mlp_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
        }
    )
    | _projections(
        {
            "attention/query": "gpt_neox.layers.{layer}.attention.query_key_value",
            "attention/key": "gpt_neox.layers.{layer}.attention.query_key_value",
            "attention/value": "gpt_neox.layers.{layer}.attention.query_key_value",
            "attention/output": "gpt_neox.layers.{layer}.attention.dense",
            "mlp/up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
            "mlp/down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
        }
    )
)
GPTJ = (
    _HEADS
    | {"embedding/embedding": "transformer.wte.weight"}
    | _layer_norms(
        {
            "norm": "transformer.ln_f",
            "blocks/attention_norm": "transformer.h.{layer}.ln_1",
        }
    )
    | _projections(
        {
            "attention/query": "transformer.h.{layer}.attn.q_proj",
            "attention/key": "transformer.h.{layer}.attn.k_proj",
            "attention/value": "transformer.h.{layer}.attn.v_proj",
            "attention/output": "transformer.h.{layer}.attn.out_proj",
            "mlp/up": "transformer.h.{layer}.mlp.fc_in",
            "mlp/down": "transformer.h.{layer}.mlp.fc_out",
        }
    )
)
