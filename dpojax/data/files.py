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
from typing import IO, Any

from dpojax.data.bad_records import BadRecord
from dpojax.data.fields import Row

Splits = dict[str | None, list[Row | BadRecord]]

# Characters. Decompressed, a small file can be one line that fills the memory.
_LONGEST_LINE = 2**28


def read_splits(source: str) -> Splits:
    """Rows by split, and what is none; None stands for data that has no splits."""
    path = Path(source)
    if path.is_file() and path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return {None: list(_read_json_lines(path))}
    # Only here: it takes a second and 80 MB, which a run of JSON Lines has no use for.
    from dpojax.data.saved_datasets import load_dataset

    def rows(part: Iterable[dict[str, Any]]) -> list[Row | BadRecord]:
        return [Row(row, f"{source}, row {number}") for number, row in enumerate(part)]

    return {name: rows(part) for name, part in load_dataset(source).items()}


def checked_row(row: Row | BadRecord) -> Row:
    """The row, if it is one.

    Raises:
      BadRecord: what it is instead.
    """
    if isinstance(row, BadRecord):
        raise row
    return row


def _read_json_lines(path: Path) -> Iterator[Row | BadRecord]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        # What is no UTF-8 becomes halves of surrogate pairs, which are found below.
        with opener(path, "rt", encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(_lines(file, path), start=1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read after line {number}: {error}."
        ) from error


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise ValueError(
                f"{path}, line {number} has {_LONGEST_LINE:,} characters or more; "
                "JSON Lines hold one record a line, so give them on lines of their own."
            )
        yield line


def _parse(line: str, origin: str) -> Row | BadRecord:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord(f"{origin} is not text in utf-8.")
    try:
        row = json.loads(line)
        if "\\ud" in line.lower():
            # No tokenizer takes half of a surrogate pair.
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRecord(f"{origin} is not text: {error}.")
    except json.JSONDecodeError as error:
        return BadRecord(f"{origin} is not JSON: {error.msg}.")
    except RecursionError:
        return BadRecord(f"{origin} is nested too deeply to be a record.")
    except ValueError:
        return BadRecord(f"{origin} holds a number of too many digits.")
    if not isinstance(row, dict):
        return BadRecord(
            f"{origin} is not a JSON object with a prompt and completions."
        )
    return Row(row, origin)
