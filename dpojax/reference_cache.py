"""Log-probabilities under a reference, on disk: by what they are of, file by file.

    <root>/<identity>/identity.json      what the numbers depend on beside the examples
    <root>/<identity>/<sha256>.safetensors    keys of examples, and their numbers

A directory belongs to one reference as it is computed with: contents of its weights,
settings, dtypes. In it every example has a key of its own, a hash of its token ids as
they are after truncation, the boundaries between them, and which are scored. So
whatever changes a number changes its key, and nothing else does: an epoch, another
seed, split, subset, objective or learning rate finds what is there, and of new data
only what is new is computed. Keys of whole data sets would lose all that, and keys of
single completions would be wrong where rotary scaling depends on the longest.

A file is named by the hash of its contents and appears whole, so that a damaged one is
known, and any number of processes may add theirs at the same time. This file knows no
model, no device and no settings.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load, save

from dpojax.checksums import hash_file
from dpojax.data.packing import Example
from dpojax.progress import say
from dpojax.whole_files import write_bytes

# To be raised with whatever changes the numbers by more than rounding: the mask rule,
# the row layout, the sums.
RULES = 1
_KEY_BYTES = 16

# Of each completion: its log-probability in nats, and that of its shared prefix.
Numbers = Float[np.ndarray, "completions 2"]


class Cache(NamedTuple):
    """Where the numbers of one reference are."""

    directory: Path
    identity: str  # a hash of what they depend on beside the examples
    description: str  # the same, for people


def default_root() -> Path:
    """``dpojax/reference`` in XDG_CACHE_HOME or, without it, in ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dpojax" / "reference"


def hash_files(paths: Iterable[Path]) -> bytes:
    """A hash of the contents of files, in the order of their names; not of the names.

    Time and size of a file do not tell whether its contents are the same; reading them
    does, at about a second for a gigabyte.
    """
    in_order = sorted(paths, key=lambda path: path.name)
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(hash_file, in_order))).digest()


def hash_example(example: Example) -> bytes:
    """The key of an example among those of one reference."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for tokens in (example.prompt, *example.completions):
        digest.update(np.int64(len(tokens)).tobytes())
        digest.update(np.asarray(tokens, np.int32).tobytes())
    for index, tokens in enumerate(example.completions):
        scored = np.ones(len(tokens), np.bool_)
        mask = scored if example.masks is None else example.masks[index]
        digest.update(np.packbits(mask).tobytes())
    return digest.digest()


def find_cache(root: Path, parts: Mapping[str, str]) -> Cache:
    """The place of one reference; it need not exist yet.

    Args:
      root: the directory of all of them.
      parts: what its numbers depend on beside the examples, by any names.
    """
    text = json.dumps({"rules": str(RULES), **parts}, indent=2, sort_keys=True)
    identity = hashlib.sha256(text.encode()).hexdigest()
    return Cache(root / identity[:32], identity, text)


def read_cache(cache: Cache) -> dict[bytes, Numbers]:
    """The numbers that are there, by the keys of their examples.

    A file whose contents are not those that it was written with is said to be damaged
    and removed; its numbers are computed again. Another process may have met it first.
    """
    known: dict[bytes, Numbers] = {}
    for path in sorted(cache.directory.glob("*.safetensors")):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        if hashlib.sha256(content).hexdigest() != path.stem:
            say(f"{path} is damaged and removed; its numbers are computed again.")
            path.unlink(missing_ok=True)
            continue
        tensors = load(content)
        keys = (key.tobytes() for key in tensors["keys"])
        known |= zip(keys, tensors["log_probs"], strict=True)
    return known


def write_chunk(
    cache: Cache, keys: Sequence[bytes], log_probs: Float[np.ndarray, "examples k 2"]
) -> None:
    """Adds the numbers of some examples, in a file of their own.

    Args:
      cache: where.
      keys: of the examples.
      log_probs: their numbers; 0 where an example has fewer completions.
    """
    as_rows = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES)
    content = save({"keys": as_rows, "log_probs": np.asarray(log_probs, np.float32)})
    name = hashlib.sha256(content).hexdigest()
    write_bytes(cache.directory / f"{name}.safetensors", content)
    write_bytes(cache.directory / "identity.json", cache.description.encode())
