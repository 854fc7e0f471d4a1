"""What made something: code, versions, devices, settings, as JSON can hold them.

None of it must be the same for a run to be the same run; but where it differs, its last
digits may. This file knows no run.
"""

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from dpojax import __version__
from dpojax.config import DistributedConfig, TrainConfig

MADE_BY = ("code", "versions", "devices", "XLA_FLAGS", "configuration")
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


def made_by(config: TrainConfig) -> dict[str, Any]:
    """Everything by its name."""
    return {
        "code": code(),
        "versions": versions(),
        "devices": devices(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "configuration": asdict(shared_settings(config)),
    }


def shared_settings(config: TrainConfig) -> TrainConfig:
    """Those that repeat a run, wherever it writes and however it is started."""
    return replace(
        config,
        output=None,
        checkpoints=None,
        resume=False,
        stop_after=None,
        distributed=DistributedConfig(),
    )


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What may change the last digits of what follows; None: nothing.

    Args:
      before: what `made_by` gave, among other things; of an earlier version of dpojax
        perhaps nothing.
      now: the same of this process.
    """
    names = ("code", "devices", "XLA_FLAGS")
    pairs = {name: (before.get(name), now[name]) for name in names}
    old = before.get("versions", {})
    pairs |= {name: (old.get(name), value) for name, value in now["versions"].items()}
    told = [
        f"{name} was {was} and is {value}"
        for name, (was, value) in pairs.items()
        if was != value
    ]
    return ", ".join(told) or None


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
