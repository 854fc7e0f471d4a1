"""JSON objects in files, as model directories hold them. Knows no keys."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
      ValueError: naming the file, if it is not JSON or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is not a JSON object; it holds {reprlib.repr(content)}."
        )
    return content


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object so that equal ones give equal bytes."""
    text = json.dumps(content, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
