"""Compiled programs kept between processes, so that a restart compiles nothing.

They are in ``~/.cache/dpojax/compiled`` (or below ``XDG_CACHE_HOME``), which may be
deleted at any time. What JAX's own environment variables say goes first:
``JAX_COMPILATION_CACHE_DIR`` is another directory, and
``JAX_ENABLE_COMPILATION_CACHE=false`` turns the cache off. This file knows no program.
"""

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keeps every program that is compiled from now on, and looks there first.

    A program's key holds the versions, flags and the hardware that it was compiled for,
    so that machines of several kinds may share a directory. Where it cannot be written
    to, there is no cache.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = _directory()
        if directory is None:  # JAX would warn at every program
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX keeps what takes a second; a run's many small programs add up to more.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _directory() -> Path | None:
    """Where the user's caches are, by the XDG base directory specification."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(caches, "dpojax", "compiled")
    if not directory.is_absolute():  # there is no home, or XDG says to ignore it
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory if os.access(directory, os.W_OK) else None
