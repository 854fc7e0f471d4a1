"""Files and hub names to rows, each with its origin.

JSON Lines (also gzip) are read here, line by line, so that an error names its line;
the rest is `dpojax.data.saved_datasets`' concern. This file does not know what a row
holds.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpojax.data.fields import Row


def read_splits(source: str) -> dict[str | None, list[Row]]:
    """Rows by split; None stands for data that has no splits."""
    path = Path(source)
    if path.is_file() and path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return {None: list(_read_json_lines(path))}
    # Only here: it takes a second and 80 MB, which a run of JSON Lines has no use for.
    from dpojax.data.saved_datasets import load_dataset

    def rows(part: Iterable[dict[str, Any]]) -> list[Row]:
        return [Row(row, f"{source}, row {number}") for number, row in enumerate(part)]

    return {name: rows(part) for name, part in load_dataset(source).items()}


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
