"""Files below one place: a directory, or a path in a bucket of Google Cloud Storage.

A bucket has no directories, appends to nothing and renames nothing but single objects.
Its client, gcsfs, tries again what fails for a while. Who may read there, and where the
bucket is, it finds as all of Google's clients do. What is in files is not this file's
concern.
"""

import base64
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.config import conf

from dpojax.whole_files import write_bytes

_SCHEME = "gs://"
_IN_BUCKET = re.compile(r"gs://[a-z0-9][\w.-]+(/[\w=-][\w.=-]*)+", re.ASCII)


class File(NamedTuple):
    """What a listing says of one file."""

    size: int  # bytes
    md5: str | None  # in hexadecimal; of objects, by the store itself


def as_place(given: str | Path) -> str:
    """A place by its whole name.

    Args:
      given: a directory, or ``gs://bucket/path``.

    Raises:
      ValueError: if it is neither, or buckets cannot be reached.
    """
    text = str(given)
    if not text or ("://" in text and not text.startswith(_SCHEME)):
        raise ValueError(
            f"{text!r} is no place for checkpoints; give a directory or "
            "gs://bucket/path."
        )
    if not in_bucket(text):
        return os.path.abspath(text)
    text = text.rstrip("/")
    if _IN_BUCKET.fullmatch(text) is None:
        raise ValueError(
            f"{text} is no place in a bucket; give gs://bucket/path, of letters, "
            "digits and . _ = -."
        )
    try:
        version("gcsfs")
    except PackageNotFoundError:
        raise ValueError(
            f"{text} needs a package that is not installed: run pip install "
            "'dpojax[gcs]', or give a directory."
        ) from None
    return text


def in_bucket(place: str) -> bool:
    """Whether it is in a bucket."""
    return place.startswith(_SCHEME)


@contextmanager
def reaching(place: str) -> Iterator[None]:
    """What the clients of a bucket raise, as an OSError that names the place."""
    if not in_bucket(place):
        yield
        return
    try:
        yield
    except client_errors(place) as error:
        raise OSError(f"{place} could not be reached: {error}") from error


def client_errors(place: str) -> tuple[type[Exception], ...]:
    """What the clients of a bucket raise besides what Python has names for."""
    if not in_bucket(place):
        return ()
    return (
        import_module("aiohttp").ClientError,
        import_module("gcsfs.retry").HttpError,
        import_module("google.api_core.exceptions").GoogleAPIError,
        import_module("google.auth.exceptions").GoogleAuthError,
    )


class Store:
    """Reads and writes below a place, by names relative to it."""

    def __init__(self, given: str | Path):
        """Touches nothing.

        Args:
          given: see `as_place`.

        Raises:
          ValueError: likewise.
        """
        self.place = as_place(given)
        self.in_bucket = in_bucket(self.place)
        self._files = _connect(self.in_bucket)
        self._root = self.place.removeprefix(_SCHEME)

    def names(self) -> list[str]:
        """What is directly there; nothing where there is no such place."""
        # Not isdir: it takes a bucket that refuses to answer for an empty one.
        with reaching(self.place):
            try:
                found = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        names = (name.rstrip("/").rsplit("/", 1)[-1] for name in found)
        return [name for name in names if name]

    def files(self) -> dict[str, File]:
        """All files there and below, by their names, in order."""
        start = f"{self._root}/"
        with reaching(self.place):
            found = self._files.find(self._root, detail=True)
        return {
            name.removeprefix(start): File(details["size"], _md5(details))
            for name, details in sorted(found.items())
            if name.startswith(start) and not name.endswith("/")
        }

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        with reaching(self.place):
            try:
                return self._files.info(self._at(name))["type"] == "file"
            except FileNotFoundError:
                return False

    def open(self, name: str) -> BufferedIOBase:
        """A file's bytes; what reading raises is left to the caller."""
        return self._files.open(self._at(name), "rb")

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with reaching(self.place):
            return self._files.cat_file(self._at(name))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, in place of what it held; whole or not at all."""
        if not self.in_bucket:
            write_bytes(Path(self._at(name)), content)
            return
        with reaching(self.place):
            self._files.pipe_file(self._at(name), content)

    def create(self, name: str, content: bytes) -> None:
        """Writes a file that is not there: of many at one time, one succeeds.

        Raises:
          FileExistsError: if it is there.
        """
        with reaching(self.place):
            if not self.in_bucket:
                os.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(self._at(name), content, mode="create")

    def move(self, name: str, to: "Store", new_name: str) -> None:
        """Moves what is below a name to another place of the same kind.

        In a bucket everything is copied before anything is removed.
        """
        source, target = self._at(name), to._at(new_name)
        if not self.in_bucket:
            Path(to.place).mkdir(exist_ok=True)
            Path(source).rename(target)
            return
        with reaching(self.place):
            found = self._files.find(source)
            copies = [target + path.removeprefix(source) for path in found]
            self._files.copy(found, copies, on_error="raise")
            self._files.rm(found)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def _connect(bucket: bool) -> Any:
    """A client; what is set for that of a bucket holds for the one that Orbax opens."""
    if not bucket:
        return fsspec.filesystem("file")
    # It would take TensorFlow where that happens to be installed.
    os.environ["EPATH_USE_TF"] = "false"
    # It logs what it raises, with its traceback.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # Others write here too: other processes, and TensorStore in this one.
    conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


def _md5(details: dict[str, Any]) -> str | None:
    encoded = details.get("md5Hash")
    return None if encoded is None else base64.b64decode(encoded).hex()
