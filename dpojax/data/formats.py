"""The table of formats: what a row is, by its columns, and how it becomes a record.

Columns called prompt, chosen, rejected and completion are text, taken as it stands.
Columns that say who speaks (question, instruction, history, response, conversations
and the like) become chat messages, and the tokenizer's template decides how a turn
reads. Whoever wants them as plain text maps the columns. This file opens no file.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from dpojax.data import fields, readers
from dpojax.data.bad_records import BadRecord, listed
from dpojax.data.fields import SCORE_COLUMNS, Record, Row


class Format(NamedTuple):
    """A way to write preferences down."""

    name: str
    columns: tuple[str, ...]  # a row that has them all is of this format
    read: Callable[[Row], Record]
    others: tuple[str, ...] = ()  # columns that it reads where they are


def as_record(row: Row) -> Record:
    """The record of a row, of the first format whose columns it has.

    Raises:
      ValueError: naming the origin, for a row of no format or with values that its
        format does not allow.
    """
    fields.check_depth(row.values, row.origin)
    format = _format_of(frozenset(row.values))
    if format is None:
        raise BadRecord(_unrecognised(row))
    _check_prompt(row, format)
    return format.read(row)


@lru_cache  # rows of a data set have few sets of columns
def _format_of(columns: frozenset[str]) -> Format | None:
    """The first format whose columns these are."""
    return next((each for each in FORMATS if columns.issuperset(each.columns)), None)


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """A row under the names of this file: `columns` gives for each the data's own."""
    if not columns:
        return row
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            hint = fields.nearest_hint(ours, sorted(COLUMNS))
            raise ValueError(
                f"No format has a column {ours!r}{hint}, so {theirs!r} cannot be "
                "mapped to it."
            )
        if theirs not in row.values:
            raise BadRecord(_missing(row, theirs))
    taken = {*columns.values()}
    values = {name: row.values[name] for name in row.values if name not in taken}
    values |= {ours: row.values[theirs] for ours, theirs in columns.items()}
    return Row(values, row.origin)


def _unrecognised(row: Row) -> str:
    names = _names(row)

    def likeness(format: Format) -> float:
        here = sum(column in names for column in format.columns)
        missing = [column for column in format.columns if column not in names]
        near = sum(bool(get_close_matches(column, names, 1)) for column in missing)
        # Of formats that share as much, the one that lacks least.
        return here + near / 2 - len(missing) / 100

    nearest = max(FORMATS, key=likeness)
    if likeness(nearest) <= 0:  # nothing in common with any
        return _missing(row, "prompt")
    column = next(column for column in nearest.columns if column not in names)
    return _missing(row, column, nearest)


def _missing(row: Row, column: str, format: Format | None = None) -> str:
    names = _names(row)
    hint = fields.nearest_hint(column, names)
    if format and not hint:
        wanted = ", ".join(format.columns)
        hint = f", and the nearest format, {format.name}, needs {wanted}"
    found = listed(row.values) or "nothing"
    return f"{row.origin} has no {column!r}; it has {found}{hint}."


def _check_prompt(row: Row, format: Format) -> None:
    """Refuses a misspelt prompt: without one the completions would be cut instead."""
    if format.columns != ("chosen", "rejected"):
        return
    if get_close_matches("prompt", _names(row), n=1, cutoff=0.82):  # not "prompt_id"
        raise BadRecord(_missing(row, "prompt"))


def _names(row: Row) -> list[str]:
    """Of columns, as many as are worth comparing."""
    return [str(name) for name in islice(row.values, 100)]


_SCORES = ("margin", *(name for names in SCORE_COLUMNS for name in names))
_ALPACA = ("input", "history")

# Tried in order: a format stands before those whose columns it has and more.
FORMATS = (
    Format(
        "Step-DPO",
        ("prompt", "initial_reason_steps", "chosen", "rejected"),
        readers.step_dpo,
        _SCORES,
    ),
    Format("pairs", ("prompt", "chosen", "rejected"), readers.explicit, _SCORES),
    Format(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        readers.shp,
        ("score_A", "score_B"),
    ),
    Format(
        "Stack Exchange pairs",
        ("question", "response_j", "response_k"),
        readers.stack_exchange,
        _SCORES,
    ),
    Format(
        "Orca", ("question", "chosen", "rejected"), readers.asked("question"), _SCORES
    ),
    Format(
        "alpaca pairs",
        ("instruction", "chosen", "rejected"),
        readers.alpaca_pair,
        (*_ALPACA, *_SCORES),
    ),
    Format(
        "distilabel pairs",
        ("input", "chosen", "rejected"),
        readers.asked("input"),
        _SCORES,
    ),
    *(
        Format(
            "sharegpt pairs",
            (column, "chosen", "rejected"),
            readers.sharegpt_pair(column),
            _SCORES,
        )
        for column in ("conversations", "messages")
    ),
    Format("scored completions", ("prompt", "completions", "scores"), readers.scored),
    Format("Nectar", ("prompt", "answers"), readers.nectar),
    Format("UltraFeedback", ("instruction", "completions"), readers.ultrafeedback),
    *(
        Format(
            "distilabel ratings",
            (prompt, "generations", ratings),
            readers.generations(prompt, ratings),
        )
        for prompt in ("instruction", "input", "prompt")
        for ratings in ("ratings", "rating")
    ),
    Format(
        "labelled completions",
        ("prompt", "completion", "label"),
        readers.judged(readers.single, "label"),
    ),
    Format("completions", ("prompt", "completion"), readers.single),
    Format(
        "labelled alpaca",
        ("instruction", "output", "kto_tag"),
        readers.judged(readers.alpaca_answer, "kto_tag"),
        _ALPACA,
    ),
    Format("alpaca", ("instruction", "output"), readers.alpaca, _ALPACA),
    *(
        Format(
            "labelled sharegpt",
            (column, "kto_tag"),
            readers.judged(readers.sharegpt(column), "kto_tag"),
        )
        for column in ("conversations", "messages")
    ),
    Format("pairs without a prompt", ("chosen", "rejected"), readers.implicit, _SCORES),
    *(
        Format("sharegpt", (column,), readers.sharegpt(column))
        for column in ("conversations", "messages")
    ),
)

COLUMNS = frozenset(
    name
    for format in FORMATS
    for name in (*format.columns, *format.others, "system", "tools", "weight")
)
