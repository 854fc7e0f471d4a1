"""A model directory on a mesh: its functions, its parameters, its tokenizer.

What every command does first. This file knows no objective and no loop.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpojax.data.tokenize import Tokenizer, check_vocabulary, load_tokenizer
from dpojax.models.decoder import Model, make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.functional import Params
from dpojax.models.huggingface import find_model, read_params, read_settings
from dpojax.sharding import as_shardings, make_constrain


class Loaded(NamedTuple):
    """A model ready to run."""

    model: Model
    params: Params
    settings: dict[str, Any]  # contents of config.json
    tokenizer: Tokenizer
    eos_token: int


def load_model(
    name: str, mesh: Mesh, *, compute_dtype: str | None, remat: bool = False
) -> Loaded:
    """Loads a model and its tokenizer.

    Args:
      name: a model directory or a hub name.
      mesh: where the parameters go.
      compute_dtype: dtype of activations; None is bfloat16, on a CPU float32.
      remat: recompute layers in the backward pass.

    Raises:
      ValueError: for whatever in the directory is missing, damaged or unsupported, or
        a tokenizer that does not belong to the model.
    """
    directory = find_model(name)
    settings = read_settings(directory)
    model = make_model(
        as_decoder_config(settings),
        compute_dtype=jnp.dtype(compute_dtype or default_dtype()),
        remat=remat,
        constrain=make_constrain(mesh),
    )
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, model.config.vocabulary_size, name)
    params = read_params(directory, model.params, as_shardings(model.params, mesh))
    eos_token = tokenizer.eos_token_id
    assert isinstance(eos_token, int)  # load_tokenizer refuses one without
    return Loaded(model, params, settings, tokenizer, eos_token)


def load_reference(name: str, like: Loaded, mesh: Mesh) -> Params:
    """Reads the parameters of a reference, which the policy's functions must fit.

    Raises:
      ValueError: if it is a model of another shape.
    """
    directory = find_model(name)
    wanted = like.model.config
    # Neither of these changes what the decoder computes from given weights.
    config = replace(
        as_decoder_config(read_settings(directory)),
        max_length=wanted.max_length,
        initializer_range=wanted.initializer_range,
    )
    if config != wanted:
        raise ValueError(
            f"The reference {name} is a model of another shape than the policy: "
            f"{_difference(config, wanted)}."
        )
    abstract = like.model.params
    return read_params(directory, abstract, as_shardings(abstract, mesh))


def check_positions(loaded: Loaded, length: int) -> None:
    """Refuses sequences longer than the model is meant for."""
    most = loaded.model.config.max_length
    if length > most:
        raise ValueError(
            f"Sequences of {length} tokens exceed the {most} positions of the model "
            "(max_position_embeddings); allow fewer, for example by --max-length."
        )


def default_dtype() -> str:
    """bfloat16 where the hardware multiplies it fast."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def new_directory(name: str) -> Path:
    """Refuses a directory that already holds something."""
    path = Path(name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} already exists; choose another --output.")
    return path


def _difference(found: Any, wanted: Any) -> str:
    pairs = [
        f"{name} is {vars(found)[name]} instead of {value}"
        for name, value in vars(wanted).items()
        if vars(found)[name] != value
    ]
    return ", ".join(pairs)
