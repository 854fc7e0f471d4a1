"""The safetensors files of a model directory: their tensors and values.

Headers are read at once, values on demand. Nothing else is opened: a pickle can run
code. This file knows no model, no device and no dtype but those of files.
"""

import json
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # and their bytes
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LFS = b"version https://git-lfs.github.com/spec/"

Index = tuple[slice, ...]


class StoredTensor(NamedTuple):
    """Where a tensor is, and what its file's header says of it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first dimension."""
        return _FLOATS[self.dtype] * prod(self.shape[1:])

    def read(self, index: Index) -> np.ndarray:
        """Part of its values.

        The file is closed afterwards: its pages would count as this process's memory
        as long as it is open.
        """
        with safe_open(self.path, framework="numpy") as file:
            return file.get_slice(self.name)[index]

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that is of another shape, or quantised.

        Raises:
          ValueError: naming the file, the tensor, what it is and what it should be.
        """
        if self.shape != shape:
            raise ValueError(
                f"{self.path}: {self.name} has shape {self.shape}, but config.json "
                f"asks for {shape}; the two are of different models."
            )
        if self.dtype not in _FLOATS:
            raise ValueError(
                f"{self.path}: {self.name} is of the dtype {self.dtype}; weights are "
                f"{', '.join(_FLOATS)}. Quantised models are not read: give the one "
                "that it was made from."
            )


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by its name.

    Raises:
      ValueError: if a file is missing or damaged, or there are only pickles.
    """
    if (directory / INDEX).is_file():
        return _find_indexed(directory / INDEX)
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    pickles = sorted(path.name for kind in _PICKLES for path in directory.glob(kind))
    found = (
        f", only {pickles[0]}: a pickle, which dpojax never opens, because that can "
        "run code. Save the model as safetensors, as save_pretrained of transformers "
        "does"
        if pickles
        else "; other formats of weights are not read"
    )
    raise ValueError(f"{directory} has no {SINGLE} and no index of its shards{found}.")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by their names.

    Raises:
      ValueError: if the file cannot be read, or is not such a file.
    """
    if not path.is_file():  # a pipe would be read for ever
        raise ValueError(
            f"{path} cannot be read: it is missing, or no file; fetch or write it "
            "again."
        )
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ValueError(
                    f"{path} is a pointer of Git LFS, not the weights; fetch them by "
                    "`git lfs pull`."
                )
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            views = {name: file.get_slice(name) for name in names}
            return {
                name: StoredTensor(
                    path, name, tuple(view.get_shape()), view.get_dtype()
                )
                for name, view in views.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. It is missing, damaged or cut short; "
            "fetch or write it again."
        ) from error


def _find_indexed(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = dict(json.loads(index.read_text("utf-8"))["weight_map"])
        paths = {name: Path(file) for name, file in weight_map.items()}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of shards: {error}") from error
    for path in paths.values():
        if path.parts != (path.name,) or not path.name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the shard {str(path)!r}; shards are .safetensors files "
                "beside it, so look where this index is from."
            )
    files = {name: path.name for name, path in paths.items()}
    headers = {file: read_header(index.with_name(file)) for file in set(files.values())}
    # What the index leaves out is found as well: no tensor is ignored unseen.
    tensors = {
        name: found for header in headers.values() for name, found in header.items()
    }
    for name, file in files.items():
        if name not in headers[file]:
            raise ValueError(
                f"{index} says that {name} is in {file}, which lacks it; the two are "
                "not of the same model, fetch or write it again."
            )
        tensors[name] = headers[file][name]
    return tensors
