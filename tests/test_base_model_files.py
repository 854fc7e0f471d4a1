"""Files saved from a family's base model, whose tensors lack its prefix.

The hub's first GPT-2 is one; its file holds attention's masks too.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_theirs, read

from dpojax.models.decoder import Model, make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.functional import Params
from dpojax.models.huggingface import read_settings, write_model

GPT2 = {"model_type": "gpt2", "vocab_size": 41, "n_embd": 24, "n_layer": 2, "n_head": 3}
SIZES = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
# The settings of a model, and how its tensors begin.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": (GPT2, "transformer."),
    "gpt_neox": (SIZES | {"model_type": "gpt_neox"}, "gpt_neox."),
    "llama": (SIZES | {"model_type": "llama"}, "model."),
}


def make(settings: dict[str, Any]) -> tuple[Model, Params]:
    model = make_model(as_decoder_config(settings))
    return model, jax.jit(model.init)(jax.random.key(0))


def assert_same(one: Params, other: Params) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("case", CASES)
def test_a_base_models_file_is_read_and_written_with_the_standard_names(
    case: str, tmp_path: Path
):
    settings, prefix = CASES[case]
    model, params = make(settings)
    write_model(tmp_path, params, settings, lambda _: None)
    path = tmp_path / "model.safetensors"
    standard = load_file(path)
    base = {name.removeprefix(prefix): tensor for name, tensor in standard.items()}
    assert len(base.keys() & standard.keys()) <= 1  # the output matrix has no prefix
    masks = {f"h.{n}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for n in range(2)}
    save_file(base | masks, path)
    found = read(tmp_path, model)
    assert_same(found, params)
    write_model(tmp_path / "again", found, settings, lambda _: None)
    assert load_file(tmp_path / "again/model.safetensors").keys() == standard.keys()


def test_names_of_both_kinds_are_refused(tmp_path: Path):
    model, params = make(GPT2)
    write_model(tmp_path, params, GPT2, lambda _: None)
    tensors = load_file(tmp_path / "model.safetensors")
    norm = {"ln_f.weight": tensors.pop("transformer.ln_f.weight")}
    save_file(tensors | norm, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks the tensor transformer\.ln_f\.weight"):
        read(tmp_path, model)


def test_transformers_base_model_of_gpt2_gives_the_whole_models_parameters(
    tmp_path: Path,
):
    sizes = ("num_key_value_heads", "intermediate_size")
    changes = {"model": "GPT2LMHeadModel", "without": sizes, "num_hidden_layers": 2}
    theirs = make_theirs("GPT2", changes)
    from transformers import AutoModelForCausalLM

    theirs.save_pretrained(tmp_path / "whole")
    theirs.transformer.save_pretrained(tmp_path / "base")
    settings = read_settings(tmp_path / "whole")
    (tmp_path / "base/config.json").write_text(json.dumps(settings))
    assert "wte.weight" in load_file(tmp_path / "base/model.safetensors")
    model = make_model(as_decoder_config(settings))
    whole, base = (read(tmp_path / name, model) for name in ("whole", "base"))
    assert_same(base, whole)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name, tensor in theirs.state_dict().items():
        assert (loaded.state_dict()[name] == tensor).all()
