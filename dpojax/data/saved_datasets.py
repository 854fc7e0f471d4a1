"""Parquet, Arrow, saved directories and the hub: what the library `datasets` reads.

Its tables are mapped into memory, and rows are made when they are asked for. This file
does not know what a row holds.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow
from datasets.exceptions import DatasetsError

from dpojax.data.fields import Row

# What the library raises for what is damaged, or of another form than it expects.
_FAILURES = (
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    pyarrow.ArrowException,
    DatasetsError,
)
_AT_ONCE = 1_000  # rows that are made at one time


class Table:
    """The rows of one split."""

    def __init__(self, part: datasets.Dataset, source: str):
        """Reads nothing yet."""
        self._part, self._source = part, source
        self.files = [Path(file["filename"]) for file in part.cache_files]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._part)

    def read(self, places: Iterable[int], all_checked: bool) -> Iterator[Row]:
        """The rows in these places, each with its number; every row is one.

        Raises:
          ValueError: for what cannot be read.
        """
        chosen = list(places)
        for start in range(0, len(chosen), _AT_ONCE):
            some = chosen[start : start + _AT_ONCE]
            try:
                rows = self._part.select(some).to_list()
            except (ValueError, pyarrow.ArrowException) as error:
                raise ValueError(
                    f"{self._source} cannot be read: {_first_sentence(error)}"
                ) from error
            for number, row in zip(some, rows, strict=True):
                yield Row(row, f"{self._source}, row {number}")


def load_dataset(source: str) -> dict[str | None, Table]:
    """Rows by split; None stands for data that has no splits.

    Raises:
      ValueError: for what is not there, or cannot be read.
    """
    path = Path(source)
    is_file = path.suffix in (".jsonl", ".json", ".gz", ".parquet", ".arrow")
    local = path.exists() or is_file
    found = _load_local(path) if local else _load_from_hub(source)
    if isinstance(found, datasets.Dataset):
        return {None: Table(found, source)}
    return {str(name): Table(part, source) for name, part in found.items()}


def _load_local(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    if not path.exists():
        raise ValueError(f"There is no file or directory {path}.")
    try:
        if path.is_dir():
            _check_saved(path)
            found = datasets.load_from_disk(str(path))
            assert isinstance(found, datasets.Dataset | datasets.DatasetDict)
            return found
        if not path.is_file():
            raise ValueError("it is no file.")
        if path.suffix == ".parquet":
            found = datasets.Dataset.from_parquet(str(path))
            assert isinstance(found, datasets.Dataset)
            return found
        if path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path))
    except _FAILURES as error:
        raise ValueError(f"{path} cannot be read: {_first_sentence(error)}") from error
    raise ValueError(
        f"{path} is of a kind that is not read; give .jsonl, .json, .jsonl.gz, "
        ".parquet, .arrow or a directory saved by datasets."
    )


def _check_saved(directory: Path) -> None:
    """Refuses names that lead out of a directory that datasets saved."""
    for path in (*directory.glob("*.json"), *directory.glob("*/*.json")):
        content = json.loads(path.read_text("utf-8"))
        parts = content.get("splits", []) if path.name == "dataset_dict.json" else []
        files = content.get("_data_files", []) if path.name == "state.json" else []
        for name in (*parts, *(file["filename"] for file in files)):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{path.name} names {name!r}, which leads out of it.")


def _load_from_hub(name: str) -> datasets.DatasetDict:
    try:
        found = datasets.load_dataset(name)
    except _FAILURES as error:
        raise ValueError(
            f"There is no file {name!r}, nor a data set of that name on the hub: "
            f"{_first_sentence(error)}"
        ) from error
    assert isinstance(found, datasets.DatasetDict)
    return found


def _first_sentence(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    return line.partition(". ")[0].removesuffix(".") + "."
