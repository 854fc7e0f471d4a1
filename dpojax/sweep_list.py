"""What a sweep writes beside its runs: how each of them differs from the others.

    sweep.json  {"search": …, "runs": [{"loss.beta": "0.1", "seed": "0"}, …]}

Run number i is the directory i beside it. This file knows no settings.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpojax.whole_files import write_bytes

_NAME = "sweep.json"


class SweepList(NamedTuple):
    """The runs of a sweep."""

    search: str  # which of them are trained to the end
    runs: list[dict[str, str]]  # fields and their values


def write_list(directory: Path, search: str, runs: Sequence[dict[str, str]]) -> None:
    """Writes it into a directory that may be new."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"search": search, "runs": list(runs)}, indent=1)
    write_bytes(directory / _NAME, (text + "\n").encode())


def read_list(directory: Path) -> SweepList | None:
    """What a directory's sweep is; None where it holds none.

    Raises:
      ValueError: if its file is damaged.
    """
    path = directory / _NAME
    if not path.is_file():
        return None
    try:
        return SweepList(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError):
        raise ValueError(
            f"{path} lists no runs of a sweep; it is damaged, put an intact copy back."
        ) from None
