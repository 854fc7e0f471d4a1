"""Files and hub names to rows, each with its origin.

JSON Lines (also gzip) are read here, line by line, so that an error names its line;
the rest is `dpojax.data.saved_datasets`' concern. Rows are read when they are asked
for, and none is kept: data may be larger than memory. This file does not know what a
row holds.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Protocol

from dpojax.data.bad_records import BadRecord
from dpojax.data.fields import Row

# Characters. Decompressed, a small file can be one line that fills the memory.
_LONGEST_LINE = 2**28


class Rows(Protocol):
    """The rows of one split, which are not read yet."""

    @property
    def files(self) -> list[Path]:
        """Where all their contents are; empty if some of them are in no file."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(
        self, places: Iterable[int], all_checked: bool
    ) -> Iterator[Row | BadRecord]:
        """The rows in these places, which ascend, and what is none.

        Args:
          places: of rows.
          all_checked: whether what is no row is refused wherever it is.
        """
        ...


def read_splits(source: str) -> dict[str | None, Rows]:
    """Rows by split; None stands for data that has no splits."""
    path = Path(source)
    if path.is_file() and path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        status = path.stat()
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        return {None: _same_lines(path, path.resolve(), stamp)}
    # Only here: it takes a second and 80 MB, which a run of JSON Lines has no use for.
    from dpojax.data.saved_datasets import load_dataset

    return {**load_dataset(source)}


def checked_row(row: Row | BadRecord) -> Row:
    """The row, if it is one.

    Raises:
      BadRecord: what it is instead.
    """
    if isinstance(row, BadRecord):
        raise row
    return row


class JsonLines:
    """The objects of a file that has one on each line; blank lines are none."""

    def __init__(self, path: Path):
        """Reads nothing yet."""
        self.files = [path]
        self._is_checked = False

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self._lines())

    def __len__(self) -> int:
        """How many lines are not blank."""
        return self._count

    def read(
        self, places: Iterable[int], all_checked: bool
    ) -> Iterator[Row | BadRecord]:
        """The rows in these places, which ascend, and what is none.

        Raises:
          BadRecord: naming a line that is no row, if all are checked.
        """
        all_checked &= not self._is_checked  # once is enough
        name = str(self.files[0])
        wanted = iter(places)
        place = next(wanted, None)
        for index, (number, line) in enumerate(self._lines()):
            if place is None and not all_checked:
                return
            if index != place and not all_checked:
                continue
            row = _parse(line, f"{name}, line {number}")
            if all_checked:
                checked_row(row)
            if index == place:
                yield row
                place = next(wanted, None)
        self._is_checked |= all_checked

    def _lines(self) -> Iterator[tuple[int, str]]:
        path = self.files[0]
        opener = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            # What is no UTF-8 becomes halves of surrogate pairs, which are found later.
            with opener(path, "rt", encoding="utf-8", errors="surrogateescape") as file:
                for number, line in enumerate(_lines(file, path), start=1):
                    if not line.isspace():
                        yield number, line
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} cannot be read after line {number}: {error}."
            ) from error


@lru_cache
def _same_lines(path: Path, where: Path, stamp: tuple[int, ...]) -> JsonLines:
    """The lines of a file, counted and checked once for all of its splits.

    It is another one where the path leads elsewhere by now, or the stamp differs.
    """
    return JsonLines(path)


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
        if not line.isascii():  # which a string knows without looking through it
            line.encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord(f"{origin} is not text in utf-8.")
    try:
        row = json.loads(line)
        if "\\u" in line and "\\ud" in line.lower():
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
