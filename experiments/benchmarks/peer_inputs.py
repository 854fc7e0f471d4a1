"""What the loops of TRL and Tunix share: pairs, their tokens, the peak of memory.

It runs with the interpreters of either, so that it needs nothing but Python.
"""

import json
from pathlib import Path


def read(path: Path, number: int) -> list[dict[str, list[int]]]:
    """The first pairs of ``batches.jsonl``, as token ids."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) >= number, f"{path} has {len(rows)} pairs of {number}"
    return rows[:number]


def count(rows: list[dict[str, list[int]]], batch_size: int) -> list[int]:
    """Tokens of each step's sequences; a prompt is in two of them."""
    tokens = [
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in rows
    ]
    return [
        sum(tokens[start : start + batch_size])
        for start in range(0, len(tokens), batch_size)
    ]


def host_peak() -> int:
    """Bytes of memory that the process has had at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def reset_host_peak() -> None:
    """Begins the peak anew, where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
