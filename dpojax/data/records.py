"""Readers of preference data: any file or hub name to `Record`s, checked on entry.

JSON Lines (also gzip) are read here, line by line, so that an error names its line;
Parquet, Arrow, saved directories and the hub are `datasets`' work. This file knows no
tokenizer: text and chat messages stay as they are.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets.exceptions import DatasetsError

Messages = list[dict[str, Any]]
Text = str | Messages


class Record(NamedTuple):
    """A prompt, its completions, and what an annotator said of them."""

    prompt: Text
    completions: tuple[Text, ...]  # of a pair, the preferred one first
    origin: str  # where it came from, for error messages
    # Of each completion: a rating, or 1 for good and 0 for bad.
    scores: tuple[float, ...] | None = None
    weight: float = 1.0  # how much the record counts
    tools: list[dict[str, Any]] | None = None  # schemas, for the chat template


def read_records(
    source: str,
    *,
    split: str,
    num_completions: int,
    test_size: float = 0.05,
    max_examples: int | None = None,
) -> list[Record]:
    """Reads one split of a data set.

    Data that has no splits, or only one called "train", is cut into "train" and "test":
    the same records every time, whatever else a run sets.

    Args:
      source: a ``.jsonl``, ``.json``, ``.parquet`` or ``.arrow`` file (JSON Lines also
        with ``.gz``), a directory saved by `datasets`, or a hub name.
      split: name of the split, usually ``"train"`` or ``"test"``.
      num_completions: 2 for prompt, chosen and rejected; 1 for prompt and completion
        (or chosen).
      test_size: what is cut off as the test split: a share below 1, else a number.
      max_examples: keep this many, chosen at random, before anything is cut off.

    Returns:
      The records, in the order of the data.

    Raises:
      ValueError: naming file and line for what cannot be read, and the columns or the
        splits there are for one that is missing.
    """
    if test_size < 0:
        raise ValueError(f"test_size is {test_size}; it must not be negative.")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples is {max_examples}; it must be positive.")
    splits = _read_splits(source)
    # A lone "train" is all there is: taken whole, it would hold the test split too.
    whole = splits.keys() not in ({None}, {"train"})
    if whole and split not in splits:
        raise ValueError(
            f"{source} has no split {split!r}; it has {', '.join(map(str, splits))}."
        )
    rows = splits[split] if whole else next(iter(splits.values()))
    if max_examples is not None and max_examples < len(rows):
        order = np.random.default_rng(0).permutation(len(rows))
        rows = [rows[index] for index in sorted(order[:max_examples])]
    if not whole:
        rows = _cut(rows, source, split, test_size)
    if not rows:
        raise ValueError(
            f"{source} has no examples in its split {split!r}; "
            "give other data or another test_size."
        )
    return [_as_record(row, origin, num_completions) for row, origin in rows]


Row = tuple[Mapping[str, Any], str]


def _read_splits(source: str) -> dict[str | None, list[Row]]:
    """Rows by split; None stands for data that has no splits."""
    path = Path(source)
    if path.is_file() and path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return {None: list(_read_json_lines(path))}
    if path.exists() or path.suffix in (".jsonl", ".json", ".gz", ".parquet", ".arrow"):
        found = _load_local(path)
    else:
        found = _load_from_hub(source)
    if isinstance(found, datasets.Dataset):
        return {None: _rows(found, source)}
    return {str(name): _rows(part, source) for name, part in found.items()}


def _rows(data: datasets.Dataset, source: str) -> list[Row]:
    rows = enumerate(data.to_list())
    return [(row, f"{source}, row {number}") for number, row in rows]


def _read_json_lines(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read after line {number}: {error}."
        ) from error


def _parse(line: str, origin: str) -> Row:
    try:
        row = json.loads(line)
        if "\\ud" in line.lower():
            # No tokenizer takes half of a surrogate pair.
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{origin} is not text: {error}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin} is not JSON: {error.msg}.") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{origin} is not a JSON object with a prompt and completions."
        )
    return row, origin


def _load_local(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    if not path.exists():
        raise ValueError(f"There is no file or directory {path}.")
    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
            assert isinstance(found, datasets.Dataset | datasets.DatasetDict)
            return found
        if path.suffix == ".parquet":
            found = datasets.Dataset.from_parquet(str(path))
            assert isinstance(found, datasets.Dataset)
            return found
        if path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path))
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{path} cannot be read: {_first_sentence(error)}") from error
    raise ValueError(
        f"{path} is of a kind that is not read; give .jsonl, .json, .jsonl.gz, "
        ".parquet, .arrow or a directory saved by datasets."
    )


def _load_from_hub(name: str) -> datasets.DatasetDict:
    try:
        found = datasets.load_dataset(name)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"There is no file {name!r}, nor a data set of that name on the hub: "
            f"{_first_sentence(error)}"
        ) from error
    assert isinstance(found, datasets.DatasetDict)
    return found


def _first_sentence(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    return line.partition(". ")[0].removesuffix(".") + "."


def _cut(rows: list[Row], source: str, split: str, test_size: float) -> list[Row]:
    if split not in ("train", "test"):
        raise ValueError(
            f"{source} has no split {split!r}; 'train' and 'test' can be cut off it."
        )
    wanted = test_size * len(rows) if test_size < 1 else test_size
    num_test = min(len(rows), round(wanted))
    order = np.random.default_rng(0).permutation(len(rows))
    chosen = order[:num_test] if split == "test" else order[num_test:]
    return [rows[index] for index in sorted(chosen)]


def _as_record(row: Mapping[str, Any], origin: str, num_completions: int) -> Record:
    if num_completions == 2:
        columns = ("chosen", "rejected")
    else:
        given = "chosen" in row and "completion" not in row
        columns = ("chosen",) if given else ("completion",)
    for column in ("prompt", *columns):
        if column not in row:
            raise ValueError(_missing(column, row, origin))
    prompt = _checked(row["prompt"], "prompt", origin)
    completions = tuple(_checked(row[name], name, origin) for name in columns)
    for name, completion in zip(columns, completions, strict=True):
        if _is_blank(completion):
            raise ValueError(
                f"{origin}: {name} is empty; give a completion or remove the record."
            )
    if len({type(text) for text in (prompt, *completions)}) > 1:
        raise ValueError(
            f"{origin} mixes strings and chat messages; use one form for all fields."
        )
    return Record(prompt, completions, origin)


def _is_blank(completion: Text) -> bool:
    """Whether nothing is said, and no tool is called."""
    if isinstance(completion, str):
        return not completion.strip()
    said = (
        message.get("content") or message.get("tool_calls") for message in completion
    )
    return not any(str(part).strip() for part in said if part)


def _missing(column: str, row: Mapping[str, Any], origin: str) -> str:
    nearest = get_close_matches(column, [str(key) for key in row], n=1)
    hint = f" (is {nearest[0]!r} meant?)" if nearest else ""
    found = ", ".join(map(str, row)) or "nothing"
    return f"{origin} has no {column!r}; it has {found}{hint}."


def _checked(value: Any, name: str, origin: str) -> Text:
    if isinstance(value, str):
        return value
    is_chat = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str)
        for message in value
    )
    if not is_chat:
        raise ValueError(
            f"{origin}: {name} is neither a string nor a list of messages with a role."
        )
    return value
