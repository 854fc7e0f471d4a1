"""Configs as transformers 4.5x wrote them, as many on the hub are, read as 5 does.

Their rotary settings are flat, though some families have one embedding for layers with
a window and another for the rest.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_models import read

from dpojax.data.packing import Example, as_batch
from dpojax.log_probs import logits_of
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.huggingface import read_settings

LENGTH = 30
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 36,
    "initializer_range": 0.2,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 3,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 97,
}
GEMMA3 = {
    **COMMON,
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 100.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "transformers_version": "4.50.0.dev0",
}
OLMO3 = {
    **COMMON,
    "architectures": ["Olmo3ForCausalLM"],
    "hidden_act": "silu",
    "model_type": "olmo3",
    "rope_scaling": None,
    "rope_theta": 500000,
    "sliding_window": 5,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0",
}
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
YARN = {
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "rope_type": "yarn",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3-4.50": GEMMA3,
    "gemma3-linear": GEMMA3 | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "gemma3-4.55": {
        **{k: v for k, v in GEMMA3.items() if k != "sliding_window_pattern"},
        "_sliding_window_pattern": 6,
        "layer_types": TYPES,
        "transformers_version": "4.55.0.dev0",
        "use_bidirectional_attention": False,
    },
    "olmo3": OLMO3,
    "olmo3-yarn": OLMO3 | {"rope_scaling": YARN, "layer_types": TYPES},
    # Here versions 4.57 and 5 differ: this is 5's reading.
    "olmo3-theta": OLMO3 | {"rope_theta": 100.0, "layer_types": TYPES},
    "phi3": {
        **COMMON,
        "architectures": ["Phi3ForCausalLM"],
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": 48,
        "model_type": "phi3",
        "original_max_position_embeddings": 8,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rope_scaling": {
            "long_factor": [1.0, 3.0, 9.0],
            "short_factor": [1.0, 1.1, 1.2],
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        **{
            k: COMMON[k]
            for k in COMMON.keys() - {"num_key_value_heads", "rms_norm_eps"}
        },
        "architectures": ["GPTNeoXForCausalLM"],
        "attention_bias": True,
        "classifier_dropout": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout": 0.0,
        "hidden_size": 48,
        "layer_norm_eps": 1e-05,
        "model_type": "gpt_neox",
        "rotary_emb_base": 100,
        "rotary_pct": 0.5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
    },
}


def make_directory(directory: Path, settings: dict[str, Any]) -> Any:
    """A random model of transformers beside a config in its old form."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    text = json.dumps(settings)
    directory.joinpath("config.json").write_text(text)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory, attn_implementation="eager")
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(directory)
    directory.joinpath("config.json").write_text(text)
    return theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_an_old_config_is_read_as_transformers_reads_it(name: str, tmp_path: Path):
    theirs = make_directory(tmp_path, CONFIGS[name])
    import torch

    model = make_model(as_decoder_config(read_settings(tmp_path)), remat="none")
    params = read(tmp_path, model)
    random = np.random.default_rng(0)
    tokens = random.integers(3, 97, LENGTH).astype(np.int32)
    completion = np.append(tokens[1:], 3).astype(np.int32)
    batch = as_batch([[Example(tokens[:1], (completion,))]], length=LENGTH)
    found = jax.jit(lambda params: logits_of(*model.apply(params, batch)))(params)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens[None]).long()).logits.numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
