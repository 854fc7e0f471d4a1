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

from dpojax.models.families import WEIGHT_NAMES
from dpojax.models.functional import Params

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
    with ExitStack() as stack:
        tensors = _open(directory, stack)
        expected: set[str] = set()

        def read(path: tuple, wanted: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
            names = _names(path, wanted.shape)
            expected.update(names)
            read_slice = _slice_reader(directory, tensors, names, path, wanted)
            return jax.make_array_from_callback(wanted.shape, sharding, read_slice)

        params = jax.tree.map_with_path(read, abstract, shardings)
    surplus = {name for name in tensors if name not in expected and _matters(name)}
    if "lm_head.weight" in surplus and not {"output", "score"} & abstract.keys():
        # A tied model's file may hold its copy; what becomes a reward model drops it.
        surplus.remove("lm_head.weight")
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
    for path, array in jax.tree.leaves_with_path(params):
        host = np.asarray(jax.device_get(array))
        names = _names(path, host.shape)
        layers = host if len(names) == host.shape[0] and _is_stacked(path) else [host]
        for name, layer in zip(names, layers, strict=True):
            tensors[name] = np.ascontiguousarray(layer.T if _is_kernel(path) else layer)
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
    names: list[str],
    path: tuple,
    wanted: jax.ShapeDtypeStruct,
) -> Callable[[Any], np.ndarray]:
    """A function from an index into our array to its values, read from the files."""
    stacked, kernel = _is_stacked(path), _is_kernel(path)
    shape = wanted.shape[1:] if stacked else wanted.shape
    for name in names:
        if name not in tensors:
            raise ValueError(f"{directory} lacks the tensor {name}.")
        found = tuple(tensors[name].get_slice(name).get_shape())
        if found != (shape[::-1] if kernel else shape):
            raise ValueError(
                f"{directory}: {name} has shape {found}, but config.json asks for "
                f"{shape[::-1] if kernel else shape}."
            )

    def read_one(name: str, index: Index) -> np.ndarray:
        view = tensors[name].get_slice(name)
        values = view[index[::-1]].T if kernel else view[index]
        return values.astype(wanted.dtype)

    def read(index: Index) -> np.ndarray:
        if not stacked:
            return read_one(names[0], index)
        return np.stack([read_one(name, index[1:]) for name in names[index[0]]])

    return read


def _path_name(path: tuple) -> str:
    return "/".join(str(entry.key) for entry in path)


def _is_stacked(path: tuple) -> bool:
    return path[0].key == "blocks"


def _is_kernel(path: tuple) -> bool:
    return path[-1].key == "kernel"


def _names(path: tuple, shape: tuple[int, ...]) -> list[str]:
    name = WEIGHT_NAMES[_path_name(path)]
    layers = range(shape[0]) if _is_stacked(path) else range(1)
    return [name.format(layer=layer) for layer in layers]


def _matters(name: str) -> bool:
    """Old checkpoints carry rotary tables, which are computed here."""
    return re.search(r"rotary_emb\.inv_freq$", name) is None
