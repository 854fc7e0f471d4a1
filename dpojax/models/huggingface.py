"""Model directories in Hugging Face's form: config.json and safetensors, no torch.

Reading is lazy: only the slices that a shard needs are read, straight onto it. Writing
appears by rename, whole or not at all. Tokenizers are not this file's concern.
"""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dpojax.models.families import family_of, num_heads_of
from dpojax.models.functional import Params
from dpojax.models.weight_places import Place, as_named, as_places

Index = tuple[slice, ...]


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
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} is not a model directory: it has no config.json."
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object; it holds {settings!r}.")
    return settings


def read_params(directory: Path, abstract: Params, shardings: Params) -> Params:
    """Reads a model's weights onto devices.

    Args:
      directory: a model directory with ``model.safetensors`` or an index of shards.
      abstract: nested dicts of `jax.ShapeDtypeStruct`: what to read, in which dtype.
        Without any head, the decoder alone is read.
      shardings: a `jax.sharding.Sharding` for each.

    Returns:
      Nested dicts of arrays like `abstract`.

    Raises:
      ValueError: if a tensor is missing, left over or of another shape.
    """
    settings = read_settings(directory)
    with ExitStack() as stack:
        tensors = _open(directory, stack)
        family = as_named(family_of(settings), tensors)
        places = as_places(abstract, family, num_heads_of(settings))
        expected = {
            name
            for place in jax.tree.leaves(
                places, is_leaf=lambda leaf: isinstance(leaf, Place)
            )
            for name in place.names
        }

        def read(
            place: Place, wanted: jax.ShapeDtypeStruct, sharding: Any
        ) -> jax.Array:
            read_slice = _slice_reader(directory, tensors, place, wanted)
            return jax.make_array_from_callback(wanted.shape, sharding, read_slice)

        params = jax.tree.map(
            read,
            places,
            abstract,
            shardings,
            is_leaf=lambda leaf: isinstance(leaf, Place),
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
    return params


def write_model(
    directory: Path,
    params: Params,
    settings: dict[str, Any],
    write_tokenizer: Callable[[Path], object],
) -> None:
    """Writes a model directory that `transformers` loads; it appears by rename.

    Args:
      directory: where; replaced if it exists.
      params: nested dicts of arrays.
      settings: contents of ``config.json``; its dtype is set to that of `params`.
      write_tokenizer: writes the tokenizer's files into a given directory.
    """
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors: dict[str, np.ndarray] = {}
    places = as_places(params, family_of(settings), num_heads_of(settings))
    for place, array in zip(
        jax.tree.leaves(places, is_leaf=lambda leaf: isinstance(leaf, Place)),
        jax.tree.leaves(params),
        strict=True,
    ):
        _put(tensors, place, np.asarray(jax.device_get(array)))
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype)
    write_settings(unfinished, settings, dtype)
    write_tokenizer(unfinished)
    shutil.rmtree(directory, ignore_errors=True)
    unfinished.rename(directory)


def write_settings(directory: Path, settings: dict[str, Any], dtype: str) -> None:
    """Writes ``config.json`` for weights of the given dtype."""
    kept = {key: value for key, value in settings.items() if key != "torch_dtype"}
    text = json.dumps(kept | {"dtype": dtype}, indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def _put(tensors: dict[str, np.ndarray], place: Place, host: np.ndarray) -> None:
    """Adds the tensors of one array, or its part of tensors that it shares."""
    for name, layer in zip(place.names, host if place.stacked else [host], strict=True):
        layer = layer.T if place.transposed else layer
        if place.outputs is None:
            tensors[name] = np.ascontiguousarray(layer)
            continue
        shape = place.stored_shape(layer.shape)
        whole = tensors.setdefault(name, np.empty(shape, layer.dtype))
        whole[place.stored_index(place.outputs)] = layer


def _open(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor's name to the open file that holds it."""
    index, single = (
        directory / "model.safetensors.index.json",
        directory / "model.safetensors",
    )
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{index} is not an index of shards: {error}") from error
    elif single.is_file():
        files = [single.name]
    else:
        raise ValueError(
            f"{directory} has no model.safetensors and no index of its shards; "
            "other formats of weights are not read."
        )
    tensors = {}
    for name in files:
        path = directory / Path(name).name  # an index cannot point elsewhere
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def _slice_reader(
    directory: Path,
    tensors: dict[str, Any],
    place: Place,
    wanted: jax.ShapeDtypeStruct,
) -> Callable[[Any], np.ndarray]:
    """A function from an index into our array to its values, read from the files."""
    shape = wanted.shape[1:] if place.stacked else wanted.shape
    shape = place.stored_shape(shape[::-1] if place.transposed else shape)
    for name in place.names:
        if name not in tensors:
            raise ValueError(f"{directory} lacks the tensor {name}.")
        found = tuple(tensors[name].get_slice(name).get_shape())
        if found != shape:
            raise ValueError(
                f"{directory}: {name} has shape {found}, but config.json asks for "
                f"{shape}."
            )

    def read_one(name: str, index: Index) -> np.ndarray:
        view = tensors[name].get_slice(name)
        index = index[::-1] if place.transposed else index
        values = _read_outputs(view, place, index)
        return (values.T if place.transposed else values).astype(wanted.dtype)

    def read(index: Index) -> np.ndarray:
        if not place.stacked:
            return read_one(place.names[0], index)
        return np.stack([read_one(name, index[1:]) for name in place.names[index[0]]])

    return read


def _read_outputs(view: Any, place: Place, index: Index) -> np.ndarray:
    """The slice of one tensor; of a fused one, those of its outputs that are ours."""
    if place.outputs is None:
        return view[index]
    outputs = place.outputs[index[place.outputs_dimension]]
    first = int(outputs[0])
    stored = list(index)
    stored[place.outputs_dimension] = slice(first, int(outputs[-1]) + 1)
    return view[tuple(stored)][place.stored_index(outputs - first)]


def _matters(name: str) -> bool:
    """Old checkpoints carry rotary tables and masks, which are computed here."""
    return (
        re.search(r"rotary_emb\.inv_freq$|att(n|ention)\.(masked_)?bias$", name) is None
    )
