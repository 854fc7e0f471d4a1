"""What a record is, and how the values of a row become its parts, checked on entry.

Every check names the row's origin and the column. This file knows neither files nor
which columns belong together, and no tokenizer: text and messages stay as they are.
"""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from dpojax.data.bad_records import BadRecord, shown
from dpojax.precision import LARGEST_FLOAT, SMALLEST_FLOAT

Messages = list[dict[str, Any]]
Text = str | Messages
_DEEPEST = 100  # lists and objects in one another; schemas of tools have ten
Kind = Literal["single", "pair", "judged", "ranked"]


class Row(NamedTuple):
    """A row of a data set as it was read."""

    values: Mapping[str, Any]
    origin: str


class Record(NamedTuple):
    """A prompt, its completions, and what an annotator said of them."""

    prompt: Text
    completions: tuple[Text, ...]  # of a pair, the preferred one first
    origin: str  # where it came from, for error messages
    # Of each completion: a rating, or 1 for good and 0 for bad.
    scores: tuple[float, ...] | None = None
    weight: float = 1.0  # how much the record counts
    tools: list[dict[str, Any]] | None = None  # schemas, for the chat template
    # Of two completions: the scores alone tell which is better, not the order.
    by_score: bool = False

    @property
    def kind(self) -> Kind:
        """What the record supervises."""
        if len(self.completions) == 1:
            return "single" if self.scores is None else "judged"
        return "pair" if len(self.completions) == 2 and not self.by_score else "ranked"


def make_record(
    row: Row,
    prompt: Text,
    completions: Sequence[Text],
    scores: Sequence[float] | None = None,
    by_score: bool = False,
) -> Record:
    """A record of checked parts and of the columns that go with any format.

    These are `system`, `tools` and `weight`. A `system` column makes a chat of strings,
    even where it is empty, since only a chat has a system's turn.
    """
    if row.values.get("system") is not None:
        said = tuple(as_turn(text, "assistant") for text in completions)
        prompt, completions = _with_system(as_turn(prompt, "user"), row), said
    if len({type(text) for text in (prompt, *completions)}) > 1:
        raise BadRecord(
            f"{row.origin} mixes strings and chat messages; use one form for all "
            "fields."
        )
    tools = _tools(row)
    if tools and isinstance(prompt, str):
        raise BadRecord(
            f"{row.origin} has tools, which only a chat template can show, and its "
            "prompt is a string; give messages or leave the tools out."
        )
    return Record(
        prompt,
        tuple(completions),
        row.origin,
        None if scores is None else tuple(scores),
        _weight(row),
        tools,
        by_score,
    )


def as_turn(text: Text, role: str) -> Messages:
    """A string as the one message of a speaker; messages as they are."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def text(row: Row, column: str) -> Text:
    """A string or messages; both may be empty."""
    return checked_text(row.values[column], column, row.origin)


def completion(row: Row, column: str) -> Text:
    """A string or messages in which something is said."""
    return checked_completion(row.values[column], column, row.origin)


def checked_text(value: Any, name: str, origin: str) -> Text:
    """The value, if it is a string or messages."""
    if isinstance(value, str):
        return value
    is_chat = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str)
        for message in value
    )
    if not is_chat:
        raise BadRecord(
            f"{origin}: {name} is neither a string nor a list of messages with a role."
        )
    return value


def checked_completion(value: Any, name: str, origin: str) -> Text:
    """The value, if it is a string or messages in which something is said."""
    checked = checked_text(value, name, origin)
    if is_blank(checked):
        raise BadRecord(
            f"{origin}: {name} is empty; give a completion or remove the record."
        )
    return checked


def is_blank(completion: Text) -> bool:
    """Whether nothing is said, and no tool is called."""
    if isinstance(completion, str):
        return not completion or completion.isspace()
    said = (
        message.get("content") or message.get("tool_calls") for message in completion
    )
    return not any(str(part).strip() for part in said if part)


def string(row: Row, column: str) -> str:
    """A string; it may be empty."""
    return checked_string(row.values[column], column, row.origin)


def checked_string(value: Any, name: str, origin: str) -> str:
    """The value, if it is a string."""
    if not isinstance(value, str):
        raise BadRecord(f"{origin}: {name} is not a string.")
    return value


def parsed(text: str, name: str, origin: str) -> Any:
    """What a string holds as JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"{origin}: {name} is not JSON: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(
            f"{origin}: {name} is too deep, or holds a number of too many digits."
        ) from error
    check_depth(value, f"{origin}: {name}")
    return value


def check_depth(value: Any, where: str) -> None:
    """Refuses what is nested so deeply that whoever looks into it may not come out."""
    level = [value]
    for _ in range(_DEEPEST):
        lists = [inside for inside in level if isinstance(inside, list | dict)]
        if not lists:
            return
        level = [
            value
            for inside in lists
            for value in (inside.values() if isinstance(inside, dict) else inside)
        ]
    raise BadRecord(f"{where} is nested more than {_DEEPEST} levels deep.")


def optional_string(row: Row, column: str) -> str:
    """A string, empty where the column is missing or null."""
    return "" if row.values.get(column) is None else string(row, column)


def checked_list(value: Any, name: str, origin: str) -> list[Any]:
    """The value, if it is a list of two or more, which can be ranked."""
    if not isinstance(value, list):
        raise BadRecord(f"{origin}: {name} is not a list.")
    if len(value) < 2:
        raise BadRecord(
            f"{origin}: {name} has {len(value)} completions, and a ranking needs "
            "two or more; give more or remove the record."
        )
    return value


def checked_number(value: Any, name: str, origin: str) -> float:
    """The value, if it is a number that is finite in 32 bits too."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST_FLOAT:
        raise BadRecord(
            f"{origin}: {name} is {shown(value)}; it must be a finite number."
        )
    return float(value)


def numbers(row: Row, column: str, count: int) -> list[float]:
    """One finite number for each of `count` completions."""
    values = row.values[column]
    if not isinstance(values, list) or len(values) != count:
        given = len(values) if isinstance(values, list) else "no list"
        raise BadRecord(
            f"{row.origin}: {column} has {given} for {count} completions; give one "
            "number for each."
        )
    return [checked_number(value, column, row.origin) for value in values]


def flag(row: Row, column: str, when_true: str, when_false: str) -> bool:
    """True or false, which may be written as 1 or 0."""
    value = row.values[column]
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise BadRecord(
            f"{row.origin}: {column} is {shown(value)}; it must be true or 1 "
            f"{when_true}, false or 0 {when_false}."
        )
    return bool(value)


# How data sets call what a chosen and a rejected completion scored.
SCORE_COLUMNS = (
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
)
_PAIR_SCORES = frozenset(name for names in SCORE_COLUMNS for name in names) | {"margin"}


def pair_scores(row: Row) -> tuple[float, float] | None:
    """Of chosen and rejected, or else their margin and zero, or else nothing."""
    if _PAIR_SCORES.isdisjoint(row.values):
        return None
    for columns in SCORE_COLUMNS:
        given = [row.values.get(column) for column in columns]
        if given != [None, None]:
            chosen, rejected = (
                checked_number(value, column, row.origin)
                for value, column in zip(given, columns, strict=True)
            )
            return chosen, rejected
    margin = row.values.get("margin")
    if margin is None:
        return None
    return checked_number(margin, "margin", row.origin), 0.0


def nearest_hint(name: str, names: Sequence[str]) -> str:
    """In brackets, which of the names was meant, where one is near."""
    nearest = get_close_matches(name, names, n=1)
    return f" (is {nearest[0]!r} meant?)" if nearest else ""


def _with_system(prompt: Messages, row: Row) -> Messages:
    system = optional_string(row, "system")
    if not system.strip():
        return prompt
    message = {"role": "system", "content": system}
    if prompt and prompt[0]["role"] == "system":
        if prompt[0].get("content") == system:
            return prompt
        raise BadRecord(
            f"{row.origin} has a system column and another system message; keep one."
        )
    return [message, *prompt]


def _weight(row: Row) -> float:
    value = row.values.get("weight")
    if value is None:
        return 1.0
    weight = checked_number(value, "weight", row.origin)
    if weight < SMALLEST_FLOAT:
        raise BadRecord(
            f"{row.origin}: weight is {weight:g}; it must be positive, so remove the "
            "record if it is not to count."
        )
    return weight


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = row.values.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parsed(tools, "tools", row.origin)
    if not tools or isinstance(tools, str):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord(
            f"{row.origin}: tools is neither a list of schemas nor JSON of one."
        )
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    """What was written: tables fill the keys that some other row has with null."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
