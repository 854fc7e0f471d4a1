"""Files and hub names to rows, each with its origin.

JSON Lines (also gzip) are read here, line by line, so that an error names its line;
Parquet, Arrow, saved directories and the hub are `datasets`' work. This file does not
know what a row holds.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from dpojax.data.fields import Row


def read_splits(source: str) -> dict[str | None, list[Row]]:
    """Rows by split; None stands for data that has no splits."""
    path = Path(source)
    if path.is_file() and path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return {None: list(_read_json_lines(path))}
    if path.exists() or path.suffix in (".jsonl", ".json", ".gz", ".parquet", ".arrow"):
        found = _load_local(path)
    else:
        found = _load_from_hub(source)
    if isinstance(found, datasets.Dataset):
        return {None: _rows(found, source)}
    return {str(name): _rows(part, source) for name, part in found.items()}


def _rows(data: datasets.Dataset, source: str) -> list[Row]:
    rows = enumerate(data.to_list())
    return [Row(row, f"{source}, row {number}") for number, row in rows]


def _read_json_lines(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read after line {number}: {error}."
        ) from error


def _parse(line: str, origin: str) -> Row:
    try:
        row = json.loads(line)
        if "\\ud" in line.lower():
            # No tokenizer takes half of a surrogate pair.
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{origin} is not text: {error}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin} is not JSON: {error.msg}.") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{origin} is not a JSON object with a prompt and completions."
        )
    return Row(row, origin)


def _load_local(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    if not path.exists():
        raise ValueError(f"There is no file or directory {path}.")
    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
            assert isinstance(found, datasets.Dataset | datasets.DatasetDict)
            return found
        if path.suffix == ".parquet":
            found = datasets.Dataset.from_parquet(str(path))
            assert isinstance(found, datasets.Dataset)
            return found
        if path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path))
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{path} cannot be read: {_first_sentence(error)}") from error
    raise ValueError(
        f"{path} is of a kind that is not read; give .jsonl, .json, .jsonl.gz, "
        ".parquet, .arrow or a directory saved by datasets."
    )


def _load_from_hub(name: str) -> datasets.DatasetDict:
    try:
        found = datasets.load_dataset(name)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"There is no file {name!r}, nor a data set of that name on the hub: "
            f"{_first_sentence(error)}"
        ) from error
    assert isinstance(found, datasets.DatasetDict)
    return found


def _first_sentence(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    return line.partition(". ")[0].removesuffix(".") + "."
