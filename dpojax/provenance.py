"""What made something: the code, the versions of what it stands on, the devices.

This file knows no run.
"""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import jax

from dpojax import __version__

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
    "transformers",
)


def code() -> str:
    """The version of dpojax and a hash of its files, by which changed ones are told."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        name = path.relative_to(root).as_posix()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return f"dpojax {__version__}, {digest.hexdigest()[:16]}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide numbers and files."""
    found = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | found


def devices() -> str:
    """How many there are of what kind, in how many processes."""
    kinds = {device.device_kind for device in jax.devices()}
    return (
        f"{jax.device_count()} of {', '.join(sorted(kinds))} ({jax.default_backend()}) "
        f"in {jax.process_count()} process(es)"
    )
