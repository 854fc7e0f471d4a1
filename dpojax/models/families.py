"""Model families: a Hugging Face config to a `DecoderConfig`, and the weights' names.

No setting of a config is silently ignored: each key is either read, known to say
nothing about the numbers, or allowed only at the value at which it changes nothing.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from dpojax.models.decoder import DecoderConfig, Llama3Rope

# Keys that do not change what the decoder computes from token ids.
_SILENT = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "max_window_layers", "model_type", "num_labels",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "return_dict", "torch_dtype", "transformers_version", "unsloth_version",
    "use_cache",
}  # fmt: skip
_READ = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
    "max_position_embeddings",
}  # fmt: skip
# Keys whose other values would need another decoder.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "use_sliding_window": (False,),
    "layer_types": (None,),
    "sliding_window": (None,),
    "use_mrope": (False,),
    "quantization_config": (None,),
    "attention_bias": (False,),
}


class Family(NamedTuple):
    """What distinguishes a family whose weights share the names below."""

    name: str  # what transformers' classes begin with
    qkv_bias: bool
    ignored_when_unused: frozenset[str] = frozenset()  # inert unless a switch is on


FAMILIES = {
    "llama": Family("Llama", qkv_bias=False),
    # Qwen2 states a window and layer types even where use_sliding_window is false.
    "qwen2": Family(
        "Qwen2",
        qkv_bias=True,
        ignored_when_unused=frozenset({"sliding_window", "layer_types"}),
    ),
}

# How transformers' classes end, and the head that they put on a decoder.
Head = Literal["vocabulary", "score"]
_HEADS: dict[str, Head] = {
    "ForCausalLM": "vocabulary",
    "ForSequenceClassification": "score",  # with one label: a reward model
}

# Our path of a parameter to Hugging Face's name. A `{layer}` stands where a stacked
# array is one tensor per layer; kernels are transposed there: [output, input].
WEIGHT_NAMES = {
    "embedding/embedding": "model.embed_tokens.weight",
    "output/embedding": "lm_head.weight",
    "score/embedding": "score.weight",
    "norm/scale": "model.norm.weight",
    "blocks/attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "blocks/mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
} | {
    f"blocks/{ours}/{kind}": f"model.layers.{{layer}}.{theirs}.{their_kind}"
    for ours, theirs in {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/output": "self_attn.o_proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    }.items()
    for kind, their_kind in {"kernel": "weight", "bias": "bias"}.items()
}


def as_decoder_config(settings: Mapping[str, Any]) -> DecoderConfig:
    """Reads the contents of a Hugging Face ``config.json``.

    Args:
      settings: the parsed file.

    Returns:
      The decoder's shape.

    Raises:
      ValueError: for a family, a key or a value that the decoder does not have.
    """
    family = _family(settings)
    head = _head(settings, family)
    _refuse_unsupported(settings, family)
    missing = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
               "intermediate_size"} - settings.keys()  # fmt: skip
    if missing:
        raise ValueError(f"config.json lacks {', '.join(sorted(missing))}.")
    theta, scaling = _rope(settings)
    num_heads = settings["num_attention_heads"]
    return DecoderConfig(
        vocabulary_size=settings["vocab_size"],
        width=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=num_heads,
        num_key_heads=settings.get("num_key_value_heads") or num_heads,
        head_dimension=settings.get("head_dim") or settings["hidden_size"] // num_heads,
        mlp_width=settings["intermediate_size"],
        norm_epsilon=settings.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias,
        tied_output=settings.get("tie_word_embeddings", False),
        head=head,
        max_length=settings.get("max_position_embeddings", 2048),
        initializer_range=settings.get("initializer_range", 0.02),
    )


def as_settings(config: DecoderConfig) -> dict[str, Any]:
    """The ``config.json`` of a new Llama of this shape; rotary scaling excluded."""
    assert config.rope_scaling is None and not config.qkv_bias
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_heads,
        "head_dim": config.head_dimension,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_output,
        "max_position_embeddings": config.max_length,
        "initializer_range": config.initializer_range,
    }
    return settings if config.head == "vocabulary" else as_reward_settings(settings)


def as_reward_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a reward model whose decoder is that of a causal model."""
    kept = {key: value for key, value in settings.items() if key != "num_labels"}
    return kept | {
        "architectures": [f"{_family(settings).name}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }


def _family(settings: Mapping[str, Any]) -> Family:
    name = settings.get("model_type")
    if name not in FAMILIES:
        raise ValueError(
            f"config.json has model_type {name!r}; supported: {', '.join(FAMILIES)}."
        )
    return FAMILIES[name]


def _head(settings: Mapping[str, Any], family: Family) -> Head:
    heads: dict[str, Head] = {family.name + end: head for end, head in _HEADS.items()}
    architectures = settings.get("architectures") or [next(iter(heads))]
    if len(architectures) != 1 or architectures[0] not in heads:
        raise ValueError(
            f"config.json has architectures {architectures}; dpojax reads one of "
            f"{', '.join(heads)}: a causal language model or a reward model."
        )
    head = heads[architectures[0]]
    if head == "score" and _num_labels(settings) != 1:
        raise ValueError(
            f"config.json describes a classifier of {_num_labels(settings)} labels; "
            "a reward model has one (num_labels, or one entry of id2label)."
        )
    return head


def _num_labels(settings: Mapping[str, Any]) -> int:
    """As transformers counts them: two where nothing is said."""
    labels = settings.get("id2label") or (None, None)
    return settings.get("num_labels") or len(labels)


def _refuse_unsupported(settings: Mapping[str, Any], family: Family) -> None:
    inert = _SILENT | _READ | family.ignored_when_unused
    for key, value in settings.items():
        if key in inert:
            continue
        if key not in _ONLY:
            raise ValueError(
                f"config.json has {key!r} ({value!r}), which dpojax does not know and "
                "will not ignore; remove it if it does not change the model."
            )
        if value is not None and value not in _ONLY[key]:
            raise ValueError(
                f"config.json has {key} = {value!r}; dpojax supports {_ONLY[key][0]!r}."
            )


def _rope(settings: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    """Base and scaling, from transformers 5's ``rope_parameters`` or the older keys."""
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or settings.get("rope_theta", 10_000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope.pop("type", None)
    if kind == "default":
        scaling = None
    elif kind == "llama3":
        scaling = Llama3Rope(
            factor=_take(rope, "factor"),
            low_frequency_factor=_take(rope, "low_freq_factor"),
            high_frequency_factor=_take(rope, "high_freq_factor"),
            original_length=_take(rope, "original_max_position_embeddings"),
        )
    else:
        raise ValueError(
            f"config.json scales rotary positions by {kind!r}; "
            "supported: 'default' and 'llama3'."
        )
    if rope:
        raise ValueError(f"config.json has unknown rotary settings {sorted(rope)}.")
    return float(theta), scaling


def _take(rope: dict[str, Any], key: str) -> Any:
    if key not in rope:
        raise ValueError(f"config.json lacks the rotary setting {key}.")
    return rope.pop(key)
