"""Turns of a conversation in the words of several projects, as chat messages.

LLaMA-Factory's sharegpt says {from, value}, its alpaca instruction, input and history;
messages of {role, content} stay as they are. Knows one row, no format as a whole.
"""

from typing import Any

from dpojax.data import fields
from dpojax.data.bad_records import BadRecord, shown
from dpojax.data.fields import Messages, Row, as_turn

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


def as_messages(value: Any, name: str, origin: str) -> Messages:
    """Messages, whichever way they name their speakers."""
    is_list = isinstance(value, list) and all(isinstance(m, dict) for m in value)
    if not is_list or not value:
        raise BadRecord(f"{origin}: {name} is not a list of one or more messages.")
    return [_as_message(message, name, origin) for message in value]


def turn(row: Row, column: str) -> Messages:
    """What the assistant answers: a string, a message or messages; not empty."""
    value = row.values[column]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        value = as_messages(value, column, row.origin)
    checked = fields.checked_completion(value, column, row.origin)
    return as_turn(checked, "assistant")


def instruction_turns(row: Row) -> Messages:
    """Alpaca's prompt: earlier turns, then the instruction and its input."""
    asked = [fields.string(row, "instruction"), fields.optional_string(row, "input")]
    earlier = row.values.get("history") or []
    is_pairs = isinstance(earlier, list) and all(
        isinstance(said, list) and len(said) == 2 for said in earlier
    )
    if not is_pairs:
        raise BadRecord(
            f"{row.origin}: history is not a list of pairs of what was asked and "
            "answered."
        )
    turns = [text for said in earlier for text in said]
    turns.append("\n".join(text for text in asked if text))
    roles = ("user", "assistant")
    return [
        {
            "role": roles[number % 2],
            "content": fields.checked_string(text, "history", row.origin),
        }
        for number, text in enumerate(turns)
    ]


def split_last_turn(
    messages: Messages, name: str, origin: str
) -> tuple[Messages, Messages]:
    """What was said before, and the assistant's last turn."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise BadRecord(
            f"{origin}: {name} has {len(messages)} messages, the last one by "
            f"{shown(messages[-1]['role'])}; it must end with an answer of the "
            "assistant."
        )
    return messages[:-1], messages[-1:]


def _as_message(message: dict[str, Any], name: str, origin: str) -> dict[str, Any]:
    if isinstance(message.get("role"), str):
        return message
    speaker, said = message.get("from"), message.get("value")
    is_said = isinstance(speaker, str) and speaker in _ROLES
    if not is_said or not isinstance(said, str):
        raise BadRecord(
            f"{origin}: a message of {name} is by {shown(speaker)}; it must have a "
            f"string as value and be from one of {', '.join(_ROLES)}, or have a role."
        )
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(said, origin)}
    return {"role": _ROLES[str(speaker)], "content": said}


def _calls(said: str, origin: str) -> list[dict[str, Any]]:
    """A call, or a list of calls, written as JSON."""
    calls = fields.parsed(said, "a function_call", origin)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise BadRecord(f"{origin}: a function_call names no function to call.")
    return [{"type": "function", "function": call} for call in calls]
