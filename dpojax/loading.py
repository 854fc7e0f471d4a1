"""A model directory on a mesh: its functions, its parameters, its tokenizer.

What every command does first. This file knows no objective and no loop.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpojax.data.packing import Example, end_as_input
from dpojax.data.tokenize import Tokenizer, check_vocabulary, load_tokenizer
from dpojax.models.decoder import DecoderConfig, Model, make_model
from dpojax.models.families import as_decoder_config, as_reward_settings
from dpojax.models.functional import Params
from dpojax.models.huggingface import (
    find_model,
    read_generation_settings,
    read_params,
    read_settings,
)
from dpojax.sharding import as_shardings, make_constrain


class _Source(NamedTuple):
    """A model directory but its weights."""

    directory: Path
    settings: dict[str, Any]
    generation_settings: dict[str, Any] | None
    config: DecoderConfig
    tokenizer: Tokenizer


class Loaded(NamedTuple):
    """A model ready to run."""

    model: Model
    params: Params
    settings: dict[str, Any]  # contents of config.json
    tokenizer: Tokenizer
    eos_token: int
    # Contents of generation_config.json, handed on; None: there is none
    generation_settings: dict[str, Any] | None = None


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
    source = _read_source(name)
    if source.config.head == "score":
        raise ValueError(
            f"{name} is a reward model, which predicts no tokens; give a causal "
            "language model here."
        )
    model = _make_model(source.config, mesh, compute_dtype, remat)
    shardings = as_shardings(model.params, mesh)
    params = read_params(source.directory, model.params, shardings)
    loaded = _loaded(model, params, source.settings, source.tokenizer)
    return loaded._replace(generation_settings=source.generation_settings)


def load_reward_model(
    name: str,
    mesh: Mesh,
    *,
    compute_dtype: str | None,
    remat: bool = False,
    seed: int | None = None,
) -> Loaded:
    """Loads a reward model; or makes one of a causal model, with a new head.

    A causal model's output matrix is left behind. Its padding token becomes the
    tokenizer's or, as in TRL, EOS where there is none: by it `transformers` finds where
    to read the score, see `as_reward_examples`.

    Args:
      name: a model directory or a hub name.
      mesh: where the parameters go.
      compute_dtype: dtype of activations; None is bfloat16, on a CPU float32.
      remat: recompute layers in the backward pass.
      seed: decides the head that a causal model gets; None: causal models are refused.

    Raises:
      ValueError: as `load_model`; for a causal model without a seed.
    """
    source = _read_source(name)
    model = _make_model(
        replace(source.config, head="score"), mesh, compute_dtype, remat
    )
    if source.config.head == "score":
        shardings = as_shardings(model.params, mesh)
        params = read_params(source.directory, model.params, shardings)
        return _loaded(model, params, source.settings, source.tokenizer)
    if seed is None:
        raise ValueError(
            f"{name} is a causal language model, which gives no reward; train a reward "
            "model from it first, or give one."
        )
    params = _with_new_head(source.directory, model, mesh, seed)
    if source.tokenizer.pad_token_id is None:
        source.tokenizer.pad_token = source.tokenizer.eos_token
    padding = {"pad_token_id": source.tokenizer.pad_token_id}
    settings = as_reward_settings(source.settings) | padding
    return _loaded(model, params, settings, source.tokenizer)


def as_reward_examples(examples: Sequence[Example], loaded: Loaded) -> list[Example]:
    """Examples whose completions end where a reward model reads its score.

    That is at EOS; where the model's padding token is EOS, `transformers` reads before
    it, and so does dpojax.
    """
    padding = loaded.settings.get("pad_token_id")
    return [end_as_input(example, padding) for example in examples]


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


def _read_source(name: str) -> _Source:
    directory = find_model(name)
    settings = read_settings(directory)
    config = as_decoder_config(settings)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config.vocabulary_size, name)
    generation_settings = read_generation_settings(directory)
    return _Source(directory, settings, generation_settings, config, tokenizer)


def _make_model(
    config: DecoderConfig, mesh: Mesh, compute_dtype: str | None, remat: bool
) -> Model:
    return make_model(
        config,
        compute_dtype=jnp.dtype(compute_dtype or default_dtype()),
        remat=remat,
        constrain=make_constrain(mesh),
    )


def _loaded(
    model: Model, params: Params, settings: dict[str, Any], tokenizer: Tokenizer
) -> Loaded:
    eos_token = tokenizer.eos_token_id
    assert isinstance(eos_token, int)  # load_tokenizer refuses one without
    return Loaded(model, params, settings, tokenizer, eos_token)


def _with_new_head(directory: Path, model: Model, mesh: Mesh, seed: int) -> Params:
    """A reward model's parameters: the head made, everything else read."""
    shardings = as_shardings(model.params, mesh)
    decoder = {name: leaf for name, leaf in model.params.items() if name != "score"}
    wanted = {name: shardings[name] for name in decoder}

    def make_head(key: jax.Array) -> Params:
        return model.init(key)["score"]  # the compiler drops what is not returned

    init = jax.jit(make_head, out_shardings=shardings["score"])
    params = read_params(directory, decoder, wanted)
    return params | {"score": init(jax.random.key(seed))}


def _difference(found: Any, wanted: Any) -> str:
    pairs = [
        f"{name} is {vars(found)[name]} instead of {value}"
        for name, value in vars(wanted).items()
        if vars(found)[name] != value
    ]
    return ", ".join(pairs)
