"""Files and directories that appear by rename: whole or not at all.

What is in them is not this file's concern.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from errno import EEXIST, ENOTEMPTY
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from dpojax.processes import decided_by_first, only_first

UNFINISHED = ".unfinished"  # how names end of what does not have its own yet


def new_file(name: str) -> Path:
    """Refuses a file that exists; process 0 looks.

    Raises:
      ValueError: if something of that name is there.
    """

    def look() -> str:
        if Path(name).exists():
            raise ValueError(f"{name} already exists; choose another --output.")
        return name

    return Path(decided_by_first(look))


@only_first
def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, in place of what the file held; process 0 does.

    The text goes to a file beside it, named ``.unfinished``, which then takes its name:
    whoever reads never sees a part, even if writing is cut off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    with naming(path), unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        reach_disk(file)
    unfinished.replace(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, in place of what it held; others may write it at the same time.

    The bytes go to a file of a name of its own beside it, which then takes its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}{UNFINISHED}")
    try:
        with naming(path), unfinished.open("wb") as file:
            file.write(content)
            reach_disk(file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file where the system says only what went wrong: a disk is full."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def reach_disk(file: IO[Any]) -> None:
    """Returns when what was written would survive the machine's sudden end too."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def unfinished_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into, which then takes the name of one that is new.

    Others may write one of the same name at the same time. If writing fails, nothing
    remains of it.

    Raises:
      FileExistsError: if a directory that holds something has the name by then.
    """
    name = f"{directory.name}.{uuid4().hex}{UNFINISHED}"
    unfinished = directory.with_name(name)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        try:
            unfinished.rename(directory)
        except OSError as error:
            if error.errno not in (EEXIST, ENOTEMPTY):
                raise
            raise FileExistsError(EEXIST, "already exists", str(directory)) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into, which then takes the name of the one that is wanted.

    One that has the name already keeps it until then, and is removed afterwards. If
    writing fails, nothing remains of it.
    """
    unfinished = directory.with_name(directory.name + UNFINISHED)
    replaced = directory.with_name(directory.name + ".replaced")
    for path in (unfinished, replaced):
        shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if directory.exists():
        directory.rename(replaced)
    unfinished.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)
