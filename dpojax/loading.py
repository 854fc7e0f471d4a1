"""A model directory on a mesh: its functions, its parameters, its tokenizer.

What every command does first. This file knows no objective and no loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dpojax.data.packing import Example, end_as_input
from dpojax.data.tokenize import Tokenizer, check_vocabulary, load_tokenizer
from dpojax.models.adapter_config import has_score, is_adapter, read_base_name
from dpojax.models.decoder import DecoderConfig, Model, make_model
from dpojax.models.families import as_decoder_config, as_reward_settings
from dpojax.models.functional import Params
from dpojax.models.huggingface import (
    find_model,
    read_generation_settings,
    read_settings,
)
from dpojax.models.lora import LoraShape, graft, split_adapters
from dpojax.models.peft import adapter_files, read_shape
from dpojax.models.weight_files import find_tensors
from dpojax.placing import (
    Keeping,
    make_adapters,
    make_kept_model,
    place_adapters,
    read_base,
)

# The base's shapes and settings to the adapters that it is to get.
NewAdapters = Callable[[Params, Mapping[str, Any]], LoraShape]


class _Source(NamedTuple):
    """A model directory but its weights; with adapters, that of their base."""

    name: str  # of the model or, with adapters, of their base
    directory: Path
    adapters: Path | None
    settings: dict[str, Any]
    generation_settings: dict[str, Any] | None
    config: DecoderConfig
    tokenizer: Tokenizer


class Loaded(NamedTuple):
    """A model ready to run."""

    model: Model
    params: Params  # its adapters among them, where it has any
    settings: dict[str, Any]  # contents of config.json
    tokenizer: Tokenizer
    eos_token: int
    base: str  # name of the model or, with adapters, of their base
    # Contents of generation_config.json, handed on; None: there is none
    generation_settings: dict[str, Any] | None = None


def load_model(
    name: str,
    keeping: Keeping,
    *,
    new_adapters: NewAdapters | None = None,
    seed: int = 0,
) -> Loaded:
    """Loads a model, or adapters with their base, and its tokenizer.

    Args:
      name: a directory of a model or of adapters, or a hub name.
      keeping: how it is kept and computed.
      new_adapters: decides which adapters a model gets.
      seed: decides the values of new adapters.

    Raises:
      ValueError: for a way of keeping it that cannot be, before weights are read; for
        whatever in the directory is missing, damaged or unsupported, or a tokenizer
        that does not belong to the model.
    """
    source = _read_source(name)
    if source.config.head == "score":
        raise ValueError(
            f"{name} is a reward model, which predicts no tokens; give a causal "
            "language model here."
        )
    return _load(source, keeping, new_adapters, seed)


def load_reward_model(
    name: str,
    keeping: Keeping,
    *,
    new_adapters: NewAdapters | None = None,
    seed: int | None = None,
) -> Loaded:
    """Loads a reward model; or makes one of a causal model, with a new head.

    A causal model's output matrix is left behind. Its padding token becomes the
    tokenizer's or, as in TRL, EOS where there is none: by it `transformers` finds where
    to read the score, see `as_reward_examples`.

    Args:
      name: a directory of a model or of adapters, or a hub name.
      keeping: how it is kept and computed.
      new_adapters: decides which adapters a model gets.
      seed: decides the head that a causal model gets, and the values of new adapters;
        None: causal models are refused.

    Raises:
      ValueError: as `load_model`; for a causal model without a seed.
    """
    source = _read_source(name)
    if source.config.head == "vocabulary":
        if seed is None:
            raise ValueError(
                f"{name} is a causal language model, which gives no reward; train a "
                "reward model from it first, or give one."
            )
        source = _with_score(source)
    return _load(source, keeping, new_adapters, seed or 0)


def as_reward_examples(examples: Sequence[Example], loaded: Loaded) -> list[Example]:
    """Examples whose completions end where a reward model reads its score.

    That is at EOS; where the model's padding token is EOS, `transformers` reads before
    it, and so does dpojax.
    """
    padding = loaded.settings.get("pad_token_id")
    return [end_as_input(example, padding) for example in examples]


def load_reference(name: str, like: Loaded, mesh: Mesh) -> Params:
    """The parameters of a reference, which the policy's functions must fit.

    The base of a policy's adapters is not read again: its own arrays are the reference,
    with the reference's adapters where it has any.

    Raises:
      ValueError: if it is a model of another shape, or has adapters of another.
    """
    directory = find_model(name)
    adapted = is_adapter(directory)
    base_name = read_base_name(directory) if adapted else name
    base = _read_same_shape(find_model(base_name), name, like, mesh)
    if not adapted:
        return base
    wanted, settings = like.model.lora, like.settings
    shape = read_shape(directory, like.model.params, settings)
    if wanted is None or replace(wanted, dropout=0.0) != shape:
        raise ValueError(
            f"The reference {name} has adapters of another shape than the policy's; "
            "write it as a whole model by dpojax export --merge, or choose another."
        )
    return graft(base, place_adapters(directory, like.model, settings, mesh))


def weight_files(name: str) -> list[Path]:
    """The files of a model's weights; of adapters all of theirs, and of their base's.

    Raises:
      ValueError: if one is missing or damaged.
    """
    directory = find_model(name)
    if is_adapter(directory):
        base = weight_files(read_base_name(directory))
        return [*adapter_files(directory), *base]
    return sorted({tensor.path for tensor in find_tensors(directory).values()})


def check_positions(
    loaded: Loaded, length: int, remedy: str = "lower --max-length"
) -> None:
    """Refuses sequences longer than the model is meant for.

    Args:
      loaded: the model.
      length: tokens of the longest sequence.
      remedy: what makes sequences shorter.
    """
    most = loaded.model.config.max_length
    if length > most:
        raise ValueError(
            f"Sequences of {length} tokens exceed the {most} positions of the model "
            f"(max_position_embeddings); {remedy}."
        )


def new_directory(name: str) -> Path:
    """Refuses a directory that already holds something."""
    path = Path(name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} already exists; choose another --output.")
    return path


def _read_source(name: str) -> _Source:
    directory = tokenizer_directory = find_model(name)
    adapters = None
    if is_adapter(directory):
        adapters, name = directory, read_base_name(directory)
        directory = find_model(name)
        if not (tokenizer_directory / "tokenizer.json").is_file():
            tokenizer_directory = directory
    settings = read_settings(directory)
    config = as_decoder_config(settings)
    tokenizer = load_tokenizer(tokenizer_directory)
    check_vocabulary(tokenizer, config.vocabulary_size, name)
    source = _Source(
        name,
        directory,
        adapters,
        settings,
        read_generation_settings(directory),
        config,
        tokenizer,
    )
    if adapters is not None and has_score(adapters) and config.head == "vocabulary":
        return _with_score(source)
    return source


def _with_score(source: _Source) -> _Source:
    """A reward model of a causal one, by its config and its padding token."""
    tokenizer = source.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    padding = {"pad_token_id": tokenizer.pad_token_id}
    return source._replace(
        settings=as_reward_settings(source.settings) | padding,
        generation_settings=None,
        config=replace(source.config, head="score"),
    )


def _load(
    source: _Source, keeping: Keeping, new_adapters: NewAdapters | None, seed: int
) -> Loaded:
    shape, mesh = None, keeping.mesh
    if source.adapters is not None:
        if new_adapters is not None:
            raise ValueError(
                f"{source.adapters} holds adapters already, which are trained further "
                "as they are; leave out --lora.rank and what describes new ones."
            )
        abstract = make_model(source.config).params
        shape = read_shape(source.adapters, abstract, source.settings)
    elif new_adapters is not None:
        shape = new_adapters(make_model(source.config).params, source.settings)
    if shape is not None:
        shape = replace(shape, dropout=keeping.dropout)
    elif keeping.base_dtype is not None or keeping.dropout:
        raise ValueError(
            "--lora.base and --lora.dropout have no effect without adapters; give "
            "--lora.rank, or a directory of adapters as --model."
        )
    model = make_kept_model(source.config, keeping, shape)
    params = read_base(source.directory, model, mesh, seed)
    if source.adapters is not None:
        read = place_adapters(source.adapters, model, source.settings, mesh)
        params = graft(params, read)
    elif shape is not None:
        params = graft(params, make_adapters(model, params, mesh, seed))
    eos_token = source.tokenizer.eos_token_id
    assert isinstance(eos_token, int)  # load_tokenizer refuses one without
    return Loaded(
        model,
        params,
        source.settings,
        source.tokenizer,
        eos_token,
        source.name,
        source.generation_settings,
    )


def _read_same_shape(directory: Path, name: str, like: Loaded, mesh: Mesh) -> Params:
    """A reference without adapters; the policy's own arrays where it is its base."""
    if like.model.lora is not None and directory == find_model(like.base):
        return split_adapters(like.params)[0]
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
    return read_base(directory, like.model, mesh, seed=0)


def _difference(found: Any, wanted: Any) -> str:
    pairs = [
        f"{name} is {vars(found)[name]} instead of {value}"
        for name, value in vars(wanted).items()
        if vars(found)[name] != value
    ]
    return ", ".join(pairs)
