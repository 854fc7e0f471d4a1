"""Prepared examples on disk: by everything that they depend on.

    <root>/<key>/<array>            see `dpojax.data.flat_examples`
    <root>/<key>/<sha256>.json      hashes of the arrays, and what became of the records

The key is a hash of the contents of the data's files, of the tokenizer with its chat
template, of every setting on the way from a row to token ids, and of the libraries'
versions. So whatever may change a token changes the key; names and times of files do
not. A directory appears whole, and every hash is compared when it is read, so that a
damaged one is known and made again. Data that takes less time to prepare than it is
worth, or is in no file, is not kept. This file knows no settings and no loss.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import jinja2
import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast

from dpojax.data.bad_records import Skipped
from dpojax.data.chats import Tokenizer
from dpojax.data.conversions import ConversionCounts
from dpojax.data.flat_examples import FlatExamples, map_examples
from dpojax.data.tokenize import Counts
from dpojax.progress import say
from dpojax.reference_cache import hash_files

# To be raised with whatever changes the examples that are made of the same data by the
# same settings: how rows are read, cut, converted, rendered, tokenised, truncated.
RULES = 1
SMALLEST = 2**25  # bytes of data; less is prepared in a few seconds
_UNFINISHED = ".unfinished"
_ABANDONED = 86_400  # seconds since something was written


class Prepared(NamedTuple):
    """Examples, and what became of the records."""

    examples: FlatExamples
    conversion: ConversionCounts
    counts: Counts
    skipped: Skipped
    hashes: dict[str, str]  # of the arrays' files


# Writes the arrays into a directory; without one they stay in memory.
Prepare = Callable[[Path | None], Prepared]


def default_root() -> Path:
    """``dpojax/tokens`` in XDG_CACHE_HOME or, without it, in ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dpojax" / "tokens"


def make_key(
    data: Sequence[Sequence[Path]],
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
) -> str | None:
    """The key of prepared data; None where it is not worth keeping or has none.

    Args:
      data: of each data set all its files; empty where its contents are in no file.
      tokenizer: one of the library `tokenizers` says all that it does.
      settings: all others on which the examples depend, by any names.
    """
    if not all(data) or _num_bytes(data) < SMALLEST:
        return None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    parts = {
        "rules": RULES,
        "data": [hash_files(files).hex() for files in data],
        "settings": dict(settings),
        "tokenizer": hashlib.sha256(_describe(tokenizer).encode()).hexdigest(),
        "libraries": [m.__version__ for m in (tokenizers, transformers, jinja2)],
    }
    if "strftime_now" in str(tokenizer.chat_template):  # it writes the date
        parts["day"] = date.today().isoformat()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load(root: Path, key: str | None, prepare: Prepare) -> Prepared:
    """What is there by this key or, where nothing is, what is now prepared and kept.

    A cache that cannot be written is said and done without.
    """
    if key is None:
        return prepare(None)
    directory = root / key[:32]
    found = _read(directory)
    if found is not None:
        return found
    try:
        with _new_directory(directory) as unfinished:
            prepared = prepare(unfinished)
            _write_note(unfinished, prepared)
        return prepared
    except OSError as error:
        say(f"The cache {directory} cannot be written ({error}); memory is used.")
        return prepare(None)


def _num_bytes(data: Sequence[Sequence[Path]]) -> int:
    return sum(path.stat().st_size for files in data for path in files)


def _describe(tokenizer: PreTrainedTokenizerFast) -> str:
    """All that decides how a tokenizer of that library renders and tokenises."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # what it was last called with
    backend.no_padding()
    parts = {
        "class": type(tokenizer).__name__,
        "backend": backend.to_str(),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
        "adds_bos": tokenizer("a")["input_ids"],
    }
    return json.dumps(parts, sort_keys=True)


def _write_note(directory: Path, prepared: Prepared) -> None:
    note = {
        "hashes": prepared.hashes,
        "fingerprint": prepared.examples.fingerprint,
        "conversion": prepared.conversion._asdict(),
        "counts": prepared.counts._asdict(),
        "skipped": prepared.skipped._asdict(),
    }
    content = json.dumps(note, indent=2).encode()
    (directory / f"{hashlib.sha256(content).hexdigest()}.json").write_bytes(content)


def _read(directory: Path) -> Prepared | None:
    if not directory.is_dir():
        return None
    note = _read_note(directory)
    if note is None:
        say(f"{directory} is damaged and removed; its data is prepared again.")
        shutil.rmtree(directory, ignore_errors=True)
        return None
    return Prepared(
        map_examples(directory, note["fingerprint"]),
        ConversionCounts(**note["conversion"]),
        Counts(**note["counts"]),
        _as_skipped(**note["skipped"]),
        note["hashes"],
    )


def _read_note(directory: Path) -> dict[str, Any] | None:
    """What was written beside the arrays, if it and all of them are whole."""
    for path in directory.glob("*.json"):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != path.stem:
            return None
        note = json.loads(content)
        paths = [directory / name for name in note["hashes"]]
        if not all(path.is_file() for path in paths):
            return None
        with ThreadPoolExecutor() as pool:
            hashes = list(pool.map(_hash, paths))
        return note if hashes == list(note["hashes"].values()) else None
    return None


def _as_skipped(split: str, reasons: list[str], num_records: int) -> Skipped:
    return Skipped(split, tuple(reasons), num_records)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into; others may write the same at the same time.

    Whoever is first gives it its name; what the others have written is the same.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(directory.parent)
    unfinished = directory.with_name(f"{directory.name}.{uuid4().hex}{_UNFINISHED}")
    unfinished.mkdir()
    try:
        yield unfinished
        try:
            unfinished.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Removes what processes that were killed have left."""
    for unfinished in root.glob(f"*{_UNFINISHED}"):
        times = [path.stat().st_mtime for path in (unfinished, *unfinished.iterdir())]
        if time.time() - max(times) > _ABANDONED:
            shutil.rmtree(unfinished, ignore_errors=True)
