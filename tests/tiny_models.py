"""Tiny random models of transformers, and the same read here, for parity tests."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from dpojax.generate import make_generate, pad_left
from dpojax.models.decoder import Model, make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.functional import Params
from dpojax.models.huggingface import read_params, read_settings
from dpojax.models.shape import DecoderConfig

# No mesh divides the vocabulary, and numbers of heads are odd.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# A decoder that is made here, for tests that read none.
SMALL = DecoderConfig(
    vocabulary_size=128,
    width=32,
    num_layers=2,
    num_heads=4,
    num_key_heads=2,
    head_dimension=8,
    mlp_width=64,
)


class Pair(NamedTuple):
    """One model, theirs and ours, and the directory that both are read from."""

    theirs: Any
    directory: Path
    model: Model
    params: Params


def make_pair(
    directory: Path, family: str, changes: dict[str, Any], seed: int = 0
) -> Pair:
    """A model of transformers, saved and read."""
    theirs = make_theirs(family, changes, seed=seed)
    theirs.save_pretrained(directory)
    model = make_model(as_decoder_config(read_settings(directory)), remat="none")
    return Pair(theirs, directory, model, read(directory, model))


def read(directory: Path, model: Model) -> Params:
    """A model's parameters on one device."""
    whole = SingleDeviceSharding(jax.devices()[0])
    return read_params(
        directory, model.params, jax.tree.map(lambda _: whole, model.params)
    )


def greedy(
    pair: Pair, rows: list[list[int]], num_new: int
) -> tuple[np.ndarray, np.ndarray]:
    """What each row is continued by here and in transformers; 2 ends a sequence."""
    torch = pytest.importorskip("torch")
    generate = make_generate(
        pair.model.extend,
        pair.model.empty_cache,
        eos_token=2,
        num_new=num_new,
        temperature=0.0,
    )
    prompts, is_prompt = pad_left(rows, max(map(len, rows)), len(rows))
    found = generate(pair.params, prompts, is_prompt, jax.random.key(0))
    with torch.no_grad():
        expected = pair.theirs.generate(
            torch.tensor(prompts).long(),
            attention_mask=torch.tensor(is_prompt).long(),
            max_new_tokens=num_new,
            do_sample=False,
            pad_token_id=2,
        )
    expected = expected[:, prompts.shape[1] :].numpy()
    return np.asarray(found)[:, : expected.shape[1]], expected


def keep_gradient() -> optax.GradientTransformation:
    """An optimiser that changes nothing; its state after a step is the gradient."""

    def init(params: Params) -> Params:
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates: Params, state: Params, params: Params | None = None) -> tuple:
        return init(updates), updates

    return optax.GradientTransformation(init, update)


def make_theirs(
    family: str,
    changes: dict[str, Any],
    ending: str = "ForCausalLM",
    seed: int = 0,
) -> Any:
    """A random model of transformers; biases and norms are random too.

    Args:
      family: what transformers' classes begin with.
      changes: settings beside SIZES; `config` and `model` are classes of other names,
        `without` are SIZES that the family calls otherwise.
      ending: what the model's class ends with.
      seed: of the numbers.
    """
    torch = pytest.importorskip("torch")
    import transformers

    config_class = getattr(transformers, changes.get("config", f"{family}Config"))
    model_class = getattr(transformers, changes.get("model", f"{family}{ending}"))
    without = {"config", "model", "without", *changes.get("without", ())}
    settings = {k: v for k, v in (SIZES | changes).items() if k not in without}
    config = config_class(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    theirs = model_class(config).eval()
    for name, parameter in theirs.named_parameters():
        if re.search("bias$|norm|ln_", name):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return theirs
