"""Bytes to a record and to every kind of supervision, for atheris: see `-help=1`.

Begun by `test_fuzz_records.py`; any error that is no sentence for a person ends it.
"""

import sys
import tempfile
from importlib import import_module
from pathlib import Path

atheris = import_module("atheris")  # of the extra fuzz, which few machines have

with atheris.instrument_imports(include=["dpojax.data"]):
    from fuzzing import check_sentence

    from dpojax.data.conversions import as_kind
    from dpojax.data.records import read_records

LINES = Path(tempfile.mkdtemp()) / "fuzz.jsonl"


def use(data: bytes) -> None:
    """Reads the bytes as JSON Lines."""
    LINES.write_bytes(data)
    try:
        records = read_records(str(LINES), split="train", test_size=0)
    except ValueError as error:
        check_sentence(error)
        return
    for kind in ("single", "pair", "judged", "ranked"):
        try:
            as_kind(records, kind)
        except ValueError as error:
            check_sentence(error)


atheris.Setup(sys.argv, use)
atheris.Fuzz()
