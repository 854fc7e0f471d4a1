"""Prompts to be continued, from a file of them. Knows no tokenizer and no completions.

JSON Lines hold objects with a `prompt`, a string or chat messages, and whatever else:
a file of preferences serves. Any other file is text, one prompt a line.
"""

from collections.abc import Iterator
from pathlib import Path

from dpojax.data import fields
from dpojax.data.bad_records import listed
from dpojax.data.fields import Row, Text, make_record
from dpojax.data.files import checked_row, read_splits

_JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def read_prompts(name: str) -> list[Text]:
    """The prompts of a file, in its order; blank lines are none.

    A `system` column becomes the first message, as in training.

    Raises:
      ValueError: naming the line that has no prompt; if the file is not there, is not
        text or holds no prompt.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"There is no prompts file {path}.")
    is_json = path.name.endswith(_JSON_LINES)
    prompts = list(_of_rows(name) if is_json else _of_lines(path))
    if not prompts:
        raise ValueError(f"{path} holds no prompt; give at least one.")
    return prompts


def _of_rows(name: str) -> Iterator[Text]:
    rows = read_splits(name)[None]
    for row in rows.read(range(len(rows)), all_checked=False):
        yield _of_row(checked_row(row))


def _of_row(row: Row) -> Text:
    if "prompt" not in row.values:
        hint = fields.nearest_hint("prompt", list(row.values))
        raise ValueError(
            f"{row.origin} has no 'prompt'; it has {listed(row.values)}{hint}."
        )
    fields.check_depth(row.values, row.origin)
    record = make_record(row, fields.text(row, "prompt"), ())
    if record.tools:
        raise ValueError(
            f"{row.origin} has tools, which generation does not show the model; remove "
            "them to continue without."
        )
    return record.prompt


def _of_lines(path: Path) -> Iterator[Text]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}.") from error
    yield from (line for line in text.split("\n") if line.strip())
