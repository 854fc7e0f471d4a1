"""Model directories in Hugging Face's form: config.json and safetensors, no torch.

Where one is, its settings, and which tensors it must have. How values are read and
written is `read_weights` and `write_weights`; tokenizers are not this file's concern.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from dpojax.models.families import family_of, num_heads_of
from dpojax.models.functional import Params
from dpojax.models.json_files import read_object, write_object
from dpojax.models.read_weights import read_weights
from dpojax.models.weight_files import find_tensors
from dpojax.models.weight_places import as_named, as_places, is_place
from dpojax.models.write_weights import MAX_SHARD_SIZE, as_tensors, write_weights
from dpojax.processes import is_first, wait_for_all
from dpojax.whole_files import whole_directory

_SETTINGS = "config.json"
_GENERATION = "generation_config.json"


def find_model(name: str) -> Path:
    """The directory of a model: a path, or the hub's copy fetched or cached.

    Raises:
      ValueError: if there is neither such a directory nor such a repository.
    """
    path = Path(name)
    if path.is_dir():
        return path
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"There is no model directory {name!r}, nor could it be fetched from the "
            f"Hugging Face hub: {reason}"
        ) from error


def read_settings(directory: Path) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
      ValueError: if the file is missing or is not a JSON object.
    """
    if not (directory / _SETTINGS).is_file():
        raise ValueError(
            f"{directory} is not a model directory: it has no {_SETTINGS}."
        )
    return read_object(directory / _SETTINGS)


def read_generation_settings(directory: Path) -> dict[str, Any] | None:
    """The contents of ``generation_config.json``, or None where there is none.

    dpojax hands them on and does not use them.

    Raises:
      ValueError: if the file is not a JSON object.
    """
    path = directory / _GENERATION
    return read_object(path) if path.is_file() else None


def read_params(
    directory: Path,
    abstract: Params,
    shardings: Params,
    convert: Callable[[str, jax.Array], Any] = lambda path, array: array,
) -> Params:
    """Reads a model's weights onto devices.

    Args:
      directory: a model directory with ``model.safetensors`` or an index of shards.
      abstract: nested dicts of `jax.ShapeDtypeStruct`: what to read, in which dtype.
        Without any head, the decoder alone is read.
      shardings: a `jax.sharding.Sharding` for each.
      convert: applied to each path and array as soon as it is read.

    Returns:
      Nested dicts like `abstract` of what `convert` gives: the arrays.

    Raises:
      ValueError: if a file is missing or damaged; if a tensor is missing, left over, of
        another shape, not of floating point numbers or not finite.
    """
    settings = read_settings(directory)
    tensors = find_tensors(directory)
    family = as_named(family_of(settings), tensors.keys())
    places = as_places(abstract, family, num_heads_of(settings))
    leaves = jax.tree.leaves(places, is_leaf=is_place)
    expected = {name for place in leaves for name in place.names.flat}
    missing = sorted(expected - tensors.keys())
    if missing:
        raise ValueError(
            f"{directory} lacks the tensor {missing[0]}, which its config.json asks "
            f"for (missing: {len(missing)} of {len(expected)}); the two are of "
            "different models, or a part was not saved."
        )
    surplus = {name for name in tensors if name not in expected and _matters(name)}
    if not {"output", "score"} & abstract.keys():
        # A tied model's file may hold its copy; what becomes a reward model drops it.
        surplus -= {"lm_head.weight", "lm_head.bias", "embed_out.weight"}
    if surplus:
        raise ValueError(
            f"{directory} has tensors that its config.json does not account for: "
            f"{', '.join(sorted(surplus)[:3])}."
        )
    return read_weights(tensors, places, abstract, shardings, convert)


def write_model(
    directory: Path,
    params: Params,
    settings: Mapping[str, Any],
    write_rest: Callable[[Path], object],
    *,
    generation_settings: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes a model directory that `transformers` loads; it appears by rename.

    Every process must call it, since each holds some of the values; one writes.

    Args:
      directory: where; replaced if it exists.
      params: nested dicts of arrays.
      settings: contents of ``config.json``; its dtype is set to that of `params`.
      write_rest: writes the tokenizer and what else there is into a given directory.
      generation_settings: contents of ``generation_config.json``. None: there is no
        such file, and transformers takes the settings' tokens and its own defaults.
      max_shard_size: most bytes of a file of weights, or a text like "5GB".
    """
    places = as_places(params, family_of(settings), num_heads_of(settings))
    tensors = as_tensors(params, places)
    if is_first():
        with whole_directory(directory) as unfinished:
            write_weights(unfinished, tensors, max_shard_size=max_shard_size)
            dtype = next(iter(tensors.values())).dtype
            write_settings(unfinished, settings, str(dtype), generation_settings)
            write_rest(unfinished)
    else:
        write_weights(directory, tensors, max_shard_size=max_shard_size)
    wait_for_all(f"wrote {directory}")  # nobody reads before the directory is there


def write_settings(
    directory: Path,
    settings: Mapping[str, Any],
    dtype: str,
    generation_settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``config.json`` for weights of a dtype and ``generation_config.json``."""
    kept = {key: value for key, value in settings.items() if key != "torch_dtype"}
    write_object(directory / _SETTINGS, kept | {"dtype": dtype})
    if generation_settings is not None:
        write_object(directory / _GENERATION, generation_settings)


def _matters(name: str) -> bool:
    """Old checkpoints carry rotary tables and masks, which are computed here."""
    return (
        re.search(r"rotary_emb\.inv_freq$|att(n|ention)\.(masked_)?bias$", name) is None
    )
