"""Python files of the user's own: experiments and losses. Knows what neither means."""

import importlib.util
from pathlib import Path
from typing import Any


def load_names(path: Path, what: str) -> dict[str, Any]:
    """Runs a Python file and returns its names.

    Args:
      path: the file.
      what: what it was to hold, for the error message.

    Raises:
      ValueError: if there is no such file. What the file itself raises is not caught.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"There is no {what} file {path}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)
