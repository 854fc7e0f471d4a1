"""Model families: a Hugging Face config to a `DecoderConfig` and back.

No setting of a config is silently ignored: each key is either read, known to say
nothing about the numbers, or allowed only at the value at which it changes nothing.
"""

from collections.abc import Mapping
from typing import Any, Literal

from dpojax.models.family_table import FAMILIES, Family
from dpojax.models.rope_settings import (
    KEYS,
    RopeSettings,
    check_rotation,
    read_rope,
)
from dpojax.models.setting_kinds import check_division, check_kinds, shown
from dpojax.models.shape import DecoderConfig

# Keys that do not change what the decoder computes from token ids.
_SILENT = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "max_window_layers", "model_type", "num_labels",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "return_dict", "torch_dtype", "transformers_version", "unsloth_version",
    "use_cache",
}  # fmt: skip
_READ = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps",
    "tie_word_embeddings", "max_position_embeddings",
} | KEYS  # fmt: skip
# Keys whose other values would need another decoder.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "use_sliding_window": (False,),
    "layer_types": (None,),
    "sliding_window": (None,),
    "use_bidirectional_attention": (None, False),
    "use_mrope": (False,),
    "quantization_config": (None,),
    "attention_bias": (False,),
}


# The head on a decoder: of a causal model or, with one label, of a reward model.
Head = Literal["vocabulary", "score"]


def as_decoder_config(settings: Mapping[str, Any]) -> DecoderConfig:
    """Reads the contents of a Hugging Face ``config.json``.

    Args:
      settings: the parsed file.

    Returns:
      The decoder's shape.

    Raises:
      ValueError: for a family, a key or a value that the decoder does not have.
    """
    family = family_of(settings)
    _refuse_unsupported(settings, family)
    check_kinds(settings, family.renamed, family.defaults)
    head = _head(settings, family)
    known = {family.renamed.get(key, key): value for key, value in settings.items()}
    known = {**family.defaults, **known}
    missing = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
               "intermediate_size"} - known.keys()  # fmt: skip
    if missing:
        raise ValueError(f"config.json lacks {', '.join(sorted(missing))}.")
    check_division(known)
    rope = read_rope(known, family.theta, family.window_theta, family.rope_names)
    fields = _common_fields(known, rope) | family.fields(known, rope)
    if rope.share not in (None, 1.0) and "rotary_dimension" not in fields:
        raise ValueError(
            f"config.json has partial_rotary_factor = {rope.share!r}; "
            f"dpojax supports 1.0 for {family.name}."
        )
    config = DecoderConfig(**fields, head=head)
    if config.positions == "rotary":
        for one in (rope.whole, rope.window):
            check_rotation(one, config.rotary_dimension, config.head_dimension)
    return config


def _common_fields(settings: Mapping[str, Any], rope: RopeSettings) -> dict[str, Any]:
    """What every family has."""
    num_heads = settings["num_attention_heads"]
    return {
        "vocabulary_size": settings["vocab_size"],
        "width": settings["hidden_size"],
        "num_layers": settings["num_hidden_layers"],
        "num_heads": num_heads,
        "num_key_heads": settings.get("num_key_value_heads") or num_heads,
        "head_dimension": settings.get("head_dim")
        or settings["hidden_size"] // num_heads,
        "mlp_width": settings["intermediate_size"],
        "norm_epsilon": float(settings.get("rms_norm_eps", 1e-6)),
        "rope_theta": rope.whole.theta,
        "rope_scaling": rope.whole.scaling,
        "tied_output": settings.get("tie_word_embeddings", False),
        "max_length": settings.get("max_position_embeddings", 2048),
        "initializer_range": float(settings.get("initializer_range", 0.02)),
    }


def aux_loss_coefficient(settings: Mapping[str, Any]) -> float:
    """How much the load-balancing loss of a model's routers counts in training.

    Nothing, unless the config asks for it by ``output_router_logits``, as it does for
    the losses that transformers computes.
    """
    known = {**family_of(settings).defaults, **settings}
    if not known.get("output_router_logits"):
        return 0.0
    return float(known["router_aux_loss_coef"])


def as_settings(config: DecoderConfig) -> dict[str, Any]:
    """The ``config.json`` of a new Llama of this shape; rotary scaling excluded."""
    assert config.rope_scaling is None and not config.qkv_bias and not config.window
    assert config.experts is None
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
    """The ``config.json`` of a reward model whose decoder is that of a causal model.

    Raises:
      ValueError: if transformers has no reward model of the family.
    """
    family = family_of(settings)
    named = {head: name for name, head in _heads(family).items()}
    if "score" not in named:
        raise ValueError(
            f"transformers has no reward model of {family.name}; make one of a causal "
            "model of another family."
        )
    kept = {key: value for key, value in settings.items() if key != "num_labels"}
    return kept | {
        "architectures": [named["score"]],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }


def family_of(settings: Mapping[str, Any]) -> Family:
    """The family that a config names.

    Raises:
      ValueError: if there is none of that name.
    """
    name = settings.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"config.json has model_type {shown(name)}; supported: "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[name]


def num_heads_of(settings: Mapping[str, Any]) -> int:
    """How many query heads a config has, whatever its family calls them."""
    renamed = family_of(settings).renamed
    return next(
        value
        for key, value in settings.items()
        if renamed.get(key, key) == "num_attention_heads"
    )


def _heads(family: Family) -> dict[str, Head]:
    """What transformers' classes of a family are called, and their heads."""
    classifier = family.name if family.reward_name == "" else family.reward_name
    causal: dict[str, Head] = {f"{family.name}ForCausalLM": "vocabulary"}
    if family.causal_name is not None:
        causal = {family.causal_name: "vocabulary"}
    if classifier is None:
        return causal
    return {**causal, f"{classifier}ForSequenceClassification": "score"}


def _head(settings: Mapping[str, Any], family: Family) -> Head:
    heads = _heads(family)
    architectures = settings.get("architectures") or [next(iter(heads))]
    if len(architectures) != 1 or architectures[0] not in heads:
        raise ValueError(
            f"config.json has architectures {shown(architectures)}; dpojax reads one "
            f"of {', '.join(heads)}: a causal language model or a reward model."
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
    inert = (_SILENT | _READ | family.keys | family.renamed.keys()) - family.only.keys()
    only = {**_ONLY, **family.only}
    for key, value in settings.items():
        if key in inert:
            continue
        if key not in only:
            raise ValueError(
                f"config.json has {shown(key)} ({shown(value)}), which dpojax does not "
                "know and will not ignore; remove it if it does not change the model."
            )
        if value is not None and value not in only[key]:
            allowed = " or ".join(map(repr, only[key]))
            raise ValueError(
                f"config.json has {key} = {shown(value)}; dpojax supports {allowed}."
            )
