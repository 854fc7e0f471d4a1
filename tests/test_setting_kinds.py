"""What values a config.json may hold: others are refused by their keys."""

import re
from typing import Any

import pytest

from dpojax.models.families import as_decoder_config

SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size = None; it must be a positive integer."),
        ({"vocab_size": "512"}, "vocab_size = '512'; it must be a positive integer."),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers = 2.0; it must be a positive"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True; it must be"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0; it must be"),
        ({"intermediate_size": -256}, "intermediate_size = -256; it must be"),
        ({"intermediate_size": [256]}, "intermediate_size = [256]; it must be"),
        ({"num_key_value_heads": "2"}, "'2'; it must be a positive integer or null."),
        ({"max_position_embeddings": None}, "max_position_embeddings = None; it must"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5'; it must be a positive num"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan; it must be a positive"),
        ({"rope_theta": {}}, "rope_theta = {}; it must be a positive number or null."),
        ({"rope_scaling": 8}, "rope_scaling = 8; it must be an object or null."),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": None}},
            "rope_scaling.factor = None; it must be a positive number.",
        ),
        ({"tie_word_embeddings": "yes"}, "'yes'; it must be true or false."),
        ({"num_key_value_heads": 3}, "2 query heads and 3 key heads; num_attention_"),
        ({"head_dim": None, "hidden_size": 65}, "hidden_size = 65 and 2 heads; with"),
        ({"architectures": "LlamaForCausalLM"}, "it must be a list or null."),
        ({"model_type": ["llama"]}, "model_type ['llama']; supported: "),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(
    changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=f"^config.json has .*{re.escape(message)}"):
        as_decoder_config(SETTINGS | changes)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"n_embd": None}, "n_embd = None; it must be a positive integer."),
        ("gpt2", {"n_inner": "9"}, "n_inner = '9'; it must be a positive integer or"),
        ("gptj", {"rotary_dim": None}, "rotary_dim = None; it must be a positive int"),
        ("qwen2", {"max_window_layers": -1}, "-1; it must be an integer from 0."),
        ("qwen2", {"sliding_window": "64"}, "'64'; it must be a positive integer or"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "= 0; it must be a positive number."),
        ("smollm3", {"no_rope_layers": 3}, "no_rope_layers = 3; it must be a list or"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_theta": "1e6"}}},
            "rope_parameters.full_attention.rope_theta = '1e6'; it must be a positive",
        ),
    ],
)
def test_a_familys_own_keys_are_checked_too_and_named_as_in_the_file(
    family: str, changes: dict[str, Any], message: str
):
    theirs = GPT if family.startswith("gpt") else SETTINGS
    settings = theirs | {"model_type": family, "architectures": None} | changes
    with pytest.raises(ValueError, match=f"^config.json has .*{re.escape(message)}"):
        as_decoder_config(settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": None},
        {"head_dim": None},
        {"rope_scaling": None, "rope_theta": None},
        {"architectures": None, "id2label": None},
    ],
)
def test_null_is_absence_where_transformers_takes_it_so(changes: dict[str, Any]):
    without = {key: value for key, value in SETTINGS.items() if key not in changes}
    filled = {key: value for key, value in changes.items() if value is not None}
    assert as_decoder_config(SETTINGS | changes) == as_decoder_config(without | filled)
