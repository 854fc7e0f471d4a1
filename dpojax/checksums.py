"""Directories that are sealed: a list of their files' sizes and hashes.

A sealed directory either holds every byte that it was sealed with, under its own name,
or is known as damaged. On a file system every byte is read for that, and the list is
sha256.json. A bucket knows the MD5 of each of its objects, so that nothing is read, and
the list is md5.json. What is in the files is not this file's concern.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpojax.object_store import File, Store, reaching


def seal(directory: str | Path, name: str) -> None:
    """Lists what is in a directory and below, which is to be called `name`.

    Args:
      directory: one of a file system, or in a bucket.
      name: of it, when it is whole.
    """
    store = Store(directory)
    kind, files = _kind(store), store.files()
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda item: _hash(store, *item), files.items())
        listed = {
            path: {"size": file.size, kind: found}
            for (path, file), found in zip(files.items(), hashes, strict=True)
        }
    text = json.dumps({"directory": name, "files": listed}, indent=1)
    store.write(_list_of(store), text.encode())


def find_damage(
    directory: str | Path, hashed_below: float = float("inf")
) -> str | None:
    """What of a sealed directory is not as it was sealed; None if all is.

    Args:
      directory: one that was sealed; files that were added later do not matter.
      hashed_below: files of so many bytes and more are not read: of these only what is
        known without it is compared, which takes no time and misses changed bytes.
    """
    store = Store(directory)
    kind, list_name, found = _kind(store), _list_of(store), store.files()
    if list_name not in found:
        return f"it has no {list_name}"
    try:
        sealed = json.loads(store.read(list_name))
        name = sealed["directory"]
        listed = {
            file: (int(entry["size"]), str(entry[kind]))
            for file, entry in sealed["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{list_name} is not what was written"
    own_name = store.place.rsplit("/", 1)[-1]
    if name != own_name:
        return f"it was written as {name}"

    def damage(item: tuple[str, tuple[int, str]]) -> str | None:
        file, (size, hashed) = item
        if file not in found:
            return f"{file} is missing"
        now = found[file]
        if now.size != size:
            return f"{file} has {now.size:,} bytes of {size:,}"
        is_known = now.md5 is not None or size < hashed_below
        if is_known and _hash(store, file, now) != hashed:
            return f"{file} is not what was written"
        return None

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(damage, listed.items())), None)


def hash_file(path: Path) -> bytes:
    """The SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _kind(store: Store) -> str:
    return "md5" if store.in_bucket else "sha256"


def _list_of(store: Store) -> str:
    return f"{_kind(store)}.json"


def _hash(store: Store, name: str, file: File) -> str:
    """Of a file's bytes; they are read unless a bucket has said it."""
    if file.md5 is not None:
        return file.md5
    with reaching(store.place), store.open(name) as opened:
        return hashlib.file_digest(opened, _kind(store)).hexdigest()
