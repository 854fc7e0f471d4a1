"""Hugging Face configs: what is read, and that nothing is silently ignored."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpojax.models.families import (
    as_decoder_config,
    as_reward_settings,
    as_settings,
    aux_loss_coefficient,
)
from dpojax.models.family_table import FAMILIES
from dpojax.models.rotary import Llama3Rope, LongRope, Rope, rotary_frequencies
from dpojax.models.shape import DecoderConfig, ExpertShape

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 172,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}


def llama(**changes: Any) -> dict[str, Any]:
    return LLAMA | changes


def test_a_config_is_read_into_the_decoders_shape():
    assert as_decoder_config(LLAMA) == DecoderConfig(
        vocabulary_size=512,
        width=64,
        num_layers=2,
        num_heads=4,
        num_key_heads=2,
        head_dimension=16,
        mlp_width=172,
        norm_epsilon=1e-5,
        rope_theta=500000.0,
        tied_output=True,
        max_length=1024,
    )


def test_absent_keys_mean_what_they_mean_in_transformers():
    optional = {"num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
                "rope_theta", "max_position_embeddings", "hidden_act"}  # fmt: skip
    config = as_decoder_config({k: v for k, v in LLAMA.items() if k not in optional})
    assert config.num_key_heads == 4
    assert config.norm_epsilon == 1e-6
    assert not config.tied_output
    assert config.rope_theta == 10_000.0
    assert config.max_length == 2048


def test_a_head_dimension_of_its_own_is_read():
    assert as_decoder_config(llama(head_dim=32)).head_dimension == 32
    assert as_decoder_config(llama(head_dim=None)).head_dimension == 16


def test_qwen2_has_biases_and_may_state_a_window_that_it_does_not_use():
    config = as_decoder_config(
        llama(
            architectures=["Qwen2ForCausalLM"],
            model_type="qwen2",
            use_sliding_window=False,
            sliding_window=4096,
            max_window_layers=28,
            layer_types=["full_attention", "full_attention"],
        )
    )
    assert config.qkv_bias


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}},
    ],
)
def test_rotary_settings_are_read_in_their_old_and_their_new_form(rope: dict[str, Any]):
    settings = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    config = as_decoder_config(settings | rope)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3Rope(
        factor=8.0,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
        original_length=8192,
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ],
)
def test_unscaled_rotary_settings_are_read_in_every_form(rope: dict[str, Any]):
    settings = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    config = as_decoder_config(settings | rope)
    assert config.rope_theta == 5e5
    assert config.rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'; supported: llama, qwen2"),
        ({"model_type": None}, "model_type None; supported"),
        ({"architectures": ["LlamaForTokenClassification"]}, "TokenClassification"),
        ({"logit_softcap": 30.0}, r"'logit_softcap' \(30.0\), which dpojax does not"),
        ({"mlp_bias": True}, "mlp_bias = True; dpojax supports False"),
        ({"attention_bias": True}, "attention_bias = True; dpojax supports False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; dpojax supports 'silu'"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2; dpojax supports 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}},
            "by 'proportional'; supported: 'default', 'linear', 'dynamic'",
        ),
        ({"rope_scaling": {"type": "su", "factor": 4.0}}, "by 'su'; supported"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "lacks the rotary setting short_factor",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0, "alpha": 1000.0}},
            r"unknown rotary settings \['alpha'\]",
        ),
        (
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            "both rope_parameters and rope_scaling, which differ",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **SCALING, "mscale": 1.0}},
            r"unknown rotary settings \['mscale'\]",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "lacks the rotary setting low_freq_factor",
        ),
    ],
)
def test_what_the_decoder_does_not_have_is_refused_by_name(
    changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        as_decoder_config(llama(**changes))


PHI4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "embd_pdrop": 0.0,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 256,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 512,
}


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_the_scaling_of_phi3_is_longrope_whatever_it_is_called(name: str):
    """With Phi-4-mini's keys; attention's factor is sqrt(1 + log(32) / log(4096))."""
    rope = PHI4_MINI["rope_scaling"] | {"type": name}
    config = as_decoder_config(PHI4_MINI | {"rope_scaling": rope})
    assert config.rotary_dimension == 12
    scaling = config.rope_scaling
    assert isinstance(scaling, LongRope)
    assert scaling.short_factors == (1.0,) * 6
    assert scaling.long_factors == (1.0, 1.5, 2.0, 4.0, 8.0, 16.0)
    assert scaling.original_length == 4096
    assert scaling.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"long_factor": [1.0] * 5}, "has 6 numbers as short_factor and 5 as long"),
        ({"short_factor": [1.0] * 8}, "12 dimensions turn, which takes 6"),
        ({"type": "linear", "factor": 2.0}, "unknown rotary settings"),
        ({"original_max_position_embeddings": 8192}, "8192 in its rotary settings and"),
    ],
)
def test_longrope_settings_that_do_not_fit_are_refused(
    rope: dict[str, Any], message: str
):
    rope = PHI4_MINI["rope_scaling"] | rope
    with pytest.raises(ValueError, match=message):
        as_decoder_config(PHI4_MINI | {"rope_scaling": rope})


def test_phi3_has_no_other_kind_of_scaling():
    rope = {"type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="another kind than 'default' and 'longrope'"):
        as_decoder_config(PHI4_MINI | {"rope_scaling": rope})


SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,  # of GPT-J by default 64 dimensions of a head turn
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # some families' default is more than the heads
    "intermediate_size": 172,
}
# What no family has.
NEVER = {
    "logit_softcap": 30.0,
    "rope_theta_scale": 2.0,
    "mlp_bias": True,
    "pretraining_tp": 2,
    "use_mrope": True,
    "use_bidirectional_attention": True,
    "quantization_config": {"bits": 4},
    "hidden_act": "relu",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_reads_a_config_of_sizes_alone(family: str):
    config = as_decoder_config(SIZES | {"model_type": family})
    assert (config.width, config.num_heads, config.head) == (256, 4, "vocabulary")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_that_a_family_does_not_have_is_refused(family: str):
    name = f"{FAMILIES[family].name}ForTokenClassification"
    for architectures in ([name], ["T5ForConditionalGeneration"]):
        named = {"model_type": family, "architectures": architectures}
        with pytest.raises(ValueError, match=f"{architectures[0]}.*dpojax reads one"):
            as_decoder_config(SIZES | named)


@pytest.mark.parametrize(
    ("family", "key"), [(family, key) for family in FAMILIES for key in NEVER]
)
def test_what_no_family_has_is_refused_by_name(family: str, key: str):
    with pytest.raises(ValueError, match=f"config.json has '?{key}"):
        as_decoder_config(SIZES | {"model_type": family, key: NEVER[key]})


@pytest.mark.parametrize(
    ("family", "key"),
    [(name, key) for name, family in FAMILIES.items() for key in family.only],
)
def test_a_key_is_allowed_at_the_values_of_the_table_alone(family: str, key: str):
    allowed = FAMILIES[family].only[key]
    for value in allowed:
        as_decoder_config(SIZES | {"model_type": family, key: value})
    other = {"rope_type": "linear"} if key in ("rope_scaling", "rope_parameters") else 7
    with pytest.raises(ValueError, match=f"has {key} = .*; dpojax supports"):
        as_decoder_config(SIZES | {"model_type": family, key: other})


def test_a_window_is_of_the_layers_that_the_config_says():
    settings = llama(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    )
    config = as_decoder_config(settings)
    assert (config.window, config.window_layers) == (8, (False, True))
    types = ["sliding_attention", "full_attention"]
    config = as_decoder_config(settings | {"layer_types": types})
    assert config.window_layers == (True, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types .*chunked"),
        ({"layer_types": ["full_attention"]}, "for each of 2 layers"),
        ({"layer_types": ["sliding_attention"] * 2}, "but no window"),
    ],
)
def test_layer_types_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        as_decoder_config(
            llama(architectures=["Qwen2ForCausalLM"], model_type="qwen2") | changes
        )


MIXTRAL = llama(
    architectures=["MixtralForCausalLM"],
    model_type="mixtral",
    num_local_experts=4,
    num_experts_per_tok=2,
)
QWEN3_MOE = llama(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)


def test_experts_are_as_many_and_as_wide_as_the_config_says():
    config = as_decoder_config(MIXTRAL)
    shape = ExpertShape(number=4, per_token=2, width=172, renormalised=True)
    assert config.experts == shape
    config = as_decoder_config(QWEN3_MOE)
    assert config.experts == replace(shape, width=24, renormalised=False)
    renormalised = as_decoder_config(QWEN3_MOE | {"norm_topk_prob": True})
    assert renormalised.experts == replace(shape, width=24)


def test_experts_are_counted_by_their_old_and_their_new_name():
    new = {k: v for k, v in QWEN3_MOE.items() if k != "num_experts"}
    new["num_local_experts"] = 4
    assert as_decoder_config(new) == as_decoder_config(QWEN3_MOE)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (QWEN3_MOE, {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]; dpojax supp"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 and mlp_onl"),
        (QWEN3_MOE, {"num_experts_per_tok": 5}, "each token to 5 of 4 experts"),
        (
            MIXTRAL,
            {"num_experts_per_tok": 0},
            "num_experts_per_tok = 0; it must be a positive",
        ),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1; dpojax"),
        (LLAMA, {"num_local_experts": 4}, r"'num_local_experts' \(4\), which dpojax"),
    ],
)
def test_experts_that_the_decoder_does_not_have_are_refused_by_name(
    settings: dict[str, Any], changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        as_decoder_config(settings | changes)


@pytest.mark.parametrize(
    ("changes", "coefficient"),
    [
        ({}, 0.0),
        ({"router_aux_loss_coef": 0.02}, 0.0),
        ({"router_aux_loss_coef": 0.02, "output_router_logits": False}, 0.0),
        ({"router_aux_loss_coef": 0.02, "output_router_logits": True}, 0.02),
        ({"output_router_logits": True}, 0.001),
    ],
)
def test_routers_are_balanced_only_where_the_config_asks_for_it(
    changes: dict[str, Any], coefficient: float
):
    assert aux_loss_coefficient(MIXTRAL | changes) == coefficient
    assert aux_loss_coefficient(QWEN3_MOE | changes) == coefficient
    assert aux_loss_coefficient(LLAMA) == 0


def reward(**changes: Any) -> dict[str, Any]:
    return llama(architectures=["LlamaForSequenceClassification"], **changes)


@pytest.mark.parametrize("labels", [{"id2label": {"0": "good"}}, {"num_labels": 1}])
def test_a_classifier_of_one_label_is_a_reward_model(labels: dict[str, Any]):
    config = as_decoder_config(reward(**labels, problem_type="regression"))
    assert config == replace(as_decoder_config(LLAMA), head="score")


@pytest.mark.parametrize(
    ("labels", "count"),
    [({}, 2), ({"id2label": {"0": "a", "1": "b"}}, 2), ({"num_labels": 3}, 3)],
)
def test_a_classifier_of_several_labels_is_refused(labels: dict[str, Any], count: int):
    """Where nothing is said, transformers takes two labels."""
    with pytest.raises(ValueError, match=f"a classifier of {count} labels"):
        as_decoder_config(reward(**labels))


def test_the_settings_of_a_reward_model_read_back_as_its_config():
    config = replace(as_decoder_config(llama(head_dim=24)), head="score")
    assert as_decoder_config(as_settings(config)) == config


def test_a_causal_models_settings_become_a_reward_models_and_keep_the_rest():
    settings = as_reward_settings(llama(num_labels=2))
    added = {"architectures", "id2label", "label2id"}
    assert settings.keys() == LLAMA.keys() | added
    assert all(settings[key] == LLAMA[key] for key in LLAMA.keys() - added)
    assert as_decoder_config(settings).head == "score"


def test_missing_keys_are_named():
    settings = llama()
    del settings["hidden_size"], settings["vocab_size"]
    with pytest.raises(ValueError, match="lacks hidden_size, vocab_size"):
        as_decoder_config(settings)


def test_the_settings_of_a_new_model_read_back_as_its_config():
    config = as_decoder_config(llama(head_dim=24, initializer_range=0.1))
    settings = json.loads(json.dumps(as_settings(config)))
    assert as_decoder_config(settings) == config


@pytest.mark.parametrize("original_length", [None, 64, 8192])
@pytest.mark.parametrize("head_dimension", [16, 128])
def test_rotary_frequencies_equal_those_of_transformers(
    head_dimension: int, original_length: int | None
):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALING | {"original_max_position_embeddings": original_length}
    rope = {"rope_type": "default"} if original_length is None else scaling
    theirs = LlamaConfig(
        hidden_size=4 * head_dimension,
        num_attention_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | rope,
    )
    rotary = LlamaRotaryEmbedding(theirs)
    assert rotary.attention_scaling == 1.0
    expected = rotary.inv_freq.numpy()
    config = as_decoder_config(theirs.to_dict())
    rope = Rope(theta=config.rope_theta, scaling=config.rope_scaling)
    found = rotary_frequencies(rope, head_dimension)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)
