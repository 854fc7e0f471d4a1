"""Prepared examples on disk: by everything that they depend on.

    <root>/<key>/<array>            see `dpojax.data.flat_examples`
    <root>/<key>/note               what became of the records
    <root>/<key>/sha256.json        hashes of both, see `dpojax.checksums`

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
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast

from dpojax.checksums import find_damage, seal
from dpojax.data.bad_records import Skipped
from dpojax.data.chats import Tokenizer
from dpojax.data.conversions import ConversionCounts
from dpojax.data.flat_examples import FlatExamples, map_examples
from dpojax.data.tokenize import Counts
from dpojax.progress import say
from dpojax.reference_cache import hash_files
from dpojax.whole_files import UNFINISHED, unfinished_directory

# To be raised with whatever changes the examples that are made of the same data by the
# same settings: how rows are read, cut, converted, rendered, tokenised, truncated.
RULES = 1
SMALLEST = 2**25  # bytes of data; less is prepared in a few seconds
_NOTE = "note"
_ABANDONED = 86_400  # seconds since something was written


class Prepared(NamedTuple):
    """Examples, and what became of the records."""

    examples: FlatExamples
    conversion: ConversionCounts
    counts: Counts
    skipped: Skipped


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
        _remove_abandoned(root)
        with unfinished_directory(directory) as unfinished:
            prepared = prepare(unfinished)
            _write_note(unfinished, prepared)
            seal(unfinished, directory.name)
        return prepared
    except FileExistsError:  # another process was first, whose data is the same
        return load(root, key, prepare)
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
        "fingerprint": prepared.examples.fingerprint,
        "conversion": prepared.conversion._asdict(),
        "counts": prepared.counts._asdict(),
        "skipped": prepared.skipped._asdict(),
    }
    (directory / _NOTE).write_text(json.dumps(note, indent=2), encoding="utf-8")


def _read(directory: Path) -> Prepared | None:
    if not directory.is_dir():
        return None
    if find_damage(directory) is not None:
        say(f"{directory} is damaged and removed; its data is prepared again.")
        shutil.rmtree(directory, ignore_errors=True)
        return None
    note = json.loads((directory / _NOTE).read_text(encoding="utf-8"))
    return Prepared(
        map_examples(directory, note["fingerprint"]),
        ConversionCounts(**note["conversion"]),
        Counts(**note["counts"]),
        _as_skipped(**note["skipped"]),
    )


def _as_skipped(split: str, reasons: list[str], num_records: int) -> Skipped:
    return Skipped(split, tuple(reasons), num_records)


def _remove_abandoned(root: Path) -> None:
    """Removes what processes that were killed have left."""
    for unfinished in root.glob(f"*{UNFINISHED}"):
        times = [path.stat().st_mtime for path in (unfinished, *unfinished.iterdir())]
        if time.time() - max(times) > _ABANDONED:
            shutil.rmtree(unfinished, ignore_errors=True)
