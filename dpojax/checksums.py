"""Directories that are sealed: a list of their files' sizes and SHA-256 hashes.

A sealed directory either holds every byte that it was sealed with, under its own name,
or is known as damaged. What is in the files is not this file's concern.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dpojax.whole_files import write_bytes

SEAL = "sha256.json"


class _Entry(NamedTuple):
    """What is known of one file."""

    size: int  # bytes
    sha256: str


def seal(directory: Path, name: str) -> None:
    """Lists what is in a directory and below, which is to be called `name`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        entries = pool.map(_entry, files)
        listed = {
            path.relative_to(directory).as_posix(): entry._asdict()
            for path, entry in zip(files, entries, strict=True)
        }
    text = json.dumps({"directory": name, "files": listed}, indent=1)
    write_bytes(directory / SEAL, text.encode())


def find_damage(directory: Path, hashed_below: float = float("inf")) -> str | None:
    """What of a sealed directory is not as it was sealed; None if all is.

    Args:
      directory: one that was sealed; files that were added later do not matter.
      hashed_below: of files of so many bytes and more only the size is looked at, which
        takes no time and misses changed bytes.
    """
    if not (directory / SEAL).is_file():
        return f"it has no {SEAL}"
    try:
        sealed = json.loads((directory / SEAL).read_bytes())
        name = sealed["directory"]
        listed = {file: _Entry(**entry) for file, entry in sealed["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} is not what was written"
    if name != directory.name:
        return f"it was written as {name}"

    def damage(item: tuple[str, _Entry]) -> str | None:
        file, entry = item
        path = directory / file
        if not path.is_file():
            return f"{file} is missing"
        size = path.stat().st_size
        if size != entry.size:
            return f"{file} has {size:,} bytes of {entry.size:,}"
        if size < hashed_below and _entry(path) != entry:
            return f"{file} is not what was written"
        return None

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(damage, listed.items())), None)


def hash_file(path: Path) -> bytes:
    """The SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _entry(path: Path) -> _Entry:
    return _Entry(path.stat().st_size, hash_file(path).hex())
