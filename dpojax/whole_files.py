"""JSON Lines files that appear by rename: whole or not at all. Knows no contents."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def new_file(name: str) -> Path:
    """Refuses a file that exists.

    Raises:
      ValueError: if something of that name is there.
    """
    path = Path(name)
    if path.exists():
        raise ValueError(f"{path} already exists; choose another --output.")
    return path


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, in place of what the file held.

    The text goes to a file beside it, named ``.unfinished``, which then takes its name:
    whoever reads never sees a part, even if writing is cut off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    unfinished.replace(path)
