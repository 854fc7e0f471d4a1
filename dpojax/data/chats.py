"""A record's prompt and completions as strings, by way of the chat template.

A completion is a sequence of pieces that are tokenised apart: one, or alternately what
the assistant says, which is scored, and what others say, which is not. This file makes
no token ids.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from dpojax.data.bad_records import BadRecord, cut
from dpojax.data.fields import Record
from dpojax.data.template_limits import (
    UnfitTemplate,
    check_template,
    limits,
)

Tokenizer = PreTrainedTokenizerBase
Turns = Literal["all", "assistant"]


# A template is a program, which fails as programs do.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    jinja2.TemplateError,
)


class Piece(NamedTuple):
    """A part of a completion."""

    text: str
    is_scored: bool


class Rendered(NamedTuple):
    """A record as strings."""

    prompt: str
    completions: tuple[tuple[Piece, ...], ...]


def render(record: Record, tokenizer: Tokenizer, turns: Turns = "all") -> Rendered:
    """Strings as they are, messages through the tokenizer's chat template.

    Raises:
      ValueError: naming the record whose template fails or does not render what comes
        first in the same way whatever follows.
    """
    if isinstance(record.prompt, str):
        texts = [str(text) for text in record.completions]
        for text in (record.prompt, *texts):
            check_text(text, record.origin)
        return Rendered(record.prompt, tuple((Piece(text, True),) for text in texts))
    pieces = _whole_completion if turns == "all" else _assistant_turns
    with limits():
        prompt = render_messages(record, tokenizer, ())
        return Rendered(
            prompt,
            tuple(
                tuple(pieces(record, tokenizer, prompt, messages))
                for messages in record.completions
            ),
        )


def render_messages(
    record: Record,
    tokenizer: Tokenizer,
    messages: Sequence[Any],
    to_be_continued: bool | None = None,
) -> str:
    """The prompt and these messages of a completion.

    Without messages, or where they are to be continued, the beginning of the
    assistant's next turn stands at the end.
    """
    assert not isinstance(record.prompt, str)
    if to_be_continued is None:
        to_be_continued = not messages
    tools: Any = None if record.tools is None else [*record.tools]
    try:
        check_template(tokenizer.get_chat_template(tools=tools))
        rendered = tokenizer.apply_chat_template(
            [*record.prompt, *messages],
            tools=tools,
            add_generation_prompt=to_be_continued,
            tokenize=False,
        )
    except UnfitTemplate:
        raise
    except _FAILURES as error:
        reason = " ".join(cut(str(error)).split())
        raise BadRecord(
            f"{record.origin}: the tokenizer's chat template fails: {reason}"
        ) from error
    check_text(str(rendered), record.origin)
    return str(rendered)


def check_text(text: str, origin: str) -> None:
    """Refuses halves of surrogate pairs, which no tokenizer takes.

    Raises:
      BadRecord: naming the origin.
    """
    if text.isascii():  # which a string knows without looking through it
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"{origin} is not text: {error}.") from error


def _whole_completion(
    record: Record, tokenizer: Tokenizer, prompt: str, messages: Sequence[Any]
) -> Iterator[Piece]:
    whole = _render_after(record, tokenizer, prompt, messages)
    yield Piece(_without_tail(whole[len(prompt) :], tokenizer), True)


def _assistant_turns(
    record: Record, tokenizer: Tokenizer, prompt: str, messages: Sequence[Any]
) -> Iterator[Piece]:
    """What follows the assistant's last turn is no piece: nothing in it is scored."""
    whole = _render_after(record, tokenizer, prompt, messages)
    done = len(prompt)
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_messages(record, tokenizer, messages[:place], True)
        after = render_messages(record, tokenizer, messages[: place + 1])
        is_incremental = after.startswith(before) and whole.startswith(after)
        if not is_incremental or len(before) < done:
            raise BadRecord(
                f"{record.origin}: the chat template renders a turn differently once "
                "others follow, so the assistant's cannot be told apart; use another "
                "template, or score all turns."
            )
        if len(before) > done:
            yield Piece(whole[done : len(before)], False)
        said = _without_tail(whole[len(before) : len(after)], tokenizer)
        yield Piece(said, True)
        done = len(before) + len(said)


def _render_after(
    record: Record, tokenizer: Tokenizer, prompt: str, messages: Sequence[Any]
) -> str:
    whole = render_messages(record, tokenizer, messages)
    if not whole.startswith(prompt):
        raise BadRecord(
            f"{record.origin}: the chat template renders the prompt differently once a "
            "completion follows, so the two cannot be told apart; use another template."
        )
    return whole


def _without_tail(turn: str, tokenizer: Tokenizer) -> str:
    """Templates put white space after the end of a turn; it is generated nowhere."""
    stripped = turn.rstrip()
    return stripped if stripped.endswith(str(tokenizer.eos_token)) else turn
