"""How a row of each format becomes a record, whose parts are checked on the way.

One function for each format of `dpojax.data.formats`, which says which columns a row
has; here they are there.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpojax.data import fields
from dpojax.data.bad_records import BadRecord
from dpojax.data.conversations import (
    as_messages,
    instruction_turns,
    split_last_turn,
    turn,
)
from dpojax.data.fields import Record, Row, Text, make_record
from dpojax.data.prompts import split_after, split_shared

_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")

# -- Pairs -------------------------------------------------------------------------


def _pair(row: Row, prompt: Text, chosen: Text, rejected: Text) -> Record:
    prompt, pair = split_after(prompt, chosen, rejected, row.origin)
    for name, said in zip(("chosen", "rejected"), pair, strict=True):
        fields.checked_completion(said, name, row.origin)
    return make_record(row, prompt, pair, fields.pair_scores(row))


def explicit(row: Row) -> Record:
    """Prompt, chosen and rejected, each on its own."""
    prompt, chosen, rejected = (
        fields.text(row, name) for name in ("prompt", "chosen", "rejected")
    )
    return _pair(row, prompt, chosen, rejected)


def implicit(row: Row) -> Record:
    """Chosen and rejected that both begin with the prompt."""
    chosen, rejected = (fields.completion(row, name) for name in ("chosen", "rejected"))
    prompt, pair = split_shared(chosen, rejected, row.origin)
    return _pair(row, prompt, *pair)


def step_dpo(row: Row) -> Record:
    """The next step of a solution; the question and the correct steps are given."""
    question = fields.string(row, "prompt")
    prompt = f"{question}\n{fields.string(row, 'initial_reason_steps')}"
    pair = (fields.completion(row, column) for column in ("chosen", "rejected"))
    return _pair(row, prompt, *pair)


def asked(column: str) -> Callable[[Row], Record]:
    """A reader of pairs that answer what a user says in `column`."""

    def read(row: Row) -> Record:
        question = fields.text(row, column)
        chosen, rejected = (turn(row, name) for name in ("chosen", "rejected"))
        prompt, pair = split_after(question, chosen, rejected, row.origin)
        return _pair(row, fields.as_turn(prompt, "user"), *pair)

    return read


def stack_exchange(row: Row) -> Record:
    """Two answers to a question, the preferred one in `response_j`."""
    prompt = fields.as_turn(fields.text(row, "question"), "user")
    return _pair(row, prompt, turn(row, "response_j"), turn(row, "response_k"))


def shp(row: Row) -> Record:
    """Two comments on a post, the preferred one by `labels`."""
    is_a = fields.flag(row, "labels", "where A is preferred", "where B is")
    names = ["A", "B"] if is_a else ["B", "A"]
    pair = [turn(row, f"human_ref_{name}") for name in names]
    prompt = fields.as_turn(fields.string(row, "history"), "user")
    record = _pair(row, prompt, *pair)
    columns = [f"score_{name}" for name in names]
    if all(row.values.get(column) is None for column in columns):
        return record
    scores = (
        fields.checked_number(row.values.get(name), name, row.origin)
        for name in columns
    )
    return record._replace(scores=tuple(scores))


def alpaca_pair(row: Row) -> Record:
    """Two answers to alpaca's instruction."""
    return _pair(
        row, instruction_turns(row), turn(row, "chosen"), turn(row, "rejected")
    )


def sharegpt_pair(column: str) -> Callable[[Row], Record]:
    """A reader of pairs that answer the conversation in `column`."""

    def read(row: Row) -> Record:
        prompt = as_messages(row.values[column], column, row.origin)
        chosen = turn(row, "chosen")
        rejected = turn(row, "rejected")
        if prompt == chosen:  # the whole conversation once more
            prompt, (chosen, rejected) = split_shared(chosen, rejected, row.origin)
        return _pair(row, prompt, chosen, rejected)

    return read


# -- Rankings ----------------------------------------------------------------------


def _ranked(
    row: Row, prompt: Text, completions: Sequence[Text], scores: Sequence[float]
) -> Record:
    return make_record(row, prompt, completions, scores, by_score=True)


def scored(row: Row) -> Record:
    """Completions of a prompt, each with its score."""
    given = fields.checked_list(row.values["completions"], "completions", row.origin)
    # Empty ones too: a sample that ended at once has its score like any other.
    texts = [fields.checked_text(text, "completions", row.origin) for text in given]
    scores = fields.numbers(row, "scores", len(texts))
    return _ranked(row, fields.text(row, "prompt"), texts, scores)


def generations(prompt: str, ratings: str) -> Callable[[Row], Record]:
    """A reader of rated answers to what a user says in the column `prompt`."""

    def read(row: Row) -> Record:
        name = "generations"
        given = fields.checked_list(row.values[name], name, row.origin)
        texts = [fields.checked_text(text, name, row.origin) for text in given]
        scores = fields.numbers(row, ratings, len(texts))
        turns = [fields.as_turn(text, "assistant") for text in texts]
        question = fields.as_turn(fields.text(row, prompt), "user")
        return _ranked(row, question, turns, scores)

    return read


def ultrafeedback(row: Row) -> Record:
    """Answers to an instruction, each with its ratings."""
    name = "completions"
    given = fields.checked_list(row.values[name], name, row.origin)
    answers = [_entry(answer, name, "response", row) for answer in given]
    turns = [fields.as_turn(answer["response"], "assistant") for answer in answers]
    ratings = [_ratings(answer, row) for answer in answers]
    # The four ratings before the overall score: some of its 10s were meant as 1.
    if all(ratings):
        scores = [sum(some) / len(some) for some in ratings]
    else:
        scores = [
            fields.checked_number(
                answer.get("overall_score"), "overall_score", row.origin
            )
            for answer in answers
        ]
    prompt = fields.as_turn(fields.string(row, "instruction"), "user")
    return _ranked(row, prompt, turns, scores)


def _ratings(answer: Mapping[str, Any], row: Row) -> list[float]:
    """The ratings that were given; "N/A" is none."""
    annotations = answer.get("annotations") or {}
    aspects: list[Any] = [annotations]
    if isinstance(annotations, dict):
        aspects = [aspect or {} for aspect in annotations.values()]
    if not all(isinstance(aspect, dict) for aspect in aspects):
        raise BadRecord(
            f"{row.origin}: annotations of one of completions are not an object of "
            "objects, each with a Rating."
        )
    given = [str(aspect.get("Rating")) for aspect in aspects]
    ratings = [float(rating) for rating in given if _NUMBER.fullmatch(rating)]
    return [fields.checked_number(rating, "Rating", row.origin) for rating in ratings]


def nectar(row: Row) -> Record:
    """Answers to a prompt, each with its rank, of which 1 is the best."""
    given = fields.checked_list(row.values["answers"], "answers", row.origin)
    answers = [_entry(answer, "answers", "answer", row) for answer in given]
    scores = [
        -fields.checked_number(answer.get("rank"), "rank", row.origin)
        for answer in answers
    ]
    texts = [answer["answer"] for answer in answers]
    return _ranked(row, fields.text(row, "prompt"), texts, scores)


def _entry(entry: Any, name: str, key: str, row: Row) -> Mapping[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        raise BadRecord(
            f"{row.origin}: one of {name} is not an object with {key!r} as a string."
        )
    return entry


# -- One completion ----------------------------------------------------------------


def single(row: Row) -> Record:
    """A prompt and its completion."""
    prompt = fields.text(row, "prompt")
    return make_record(row, prompt, [fields.completion(row, "completion")])


def alpaca(row: Row) -> Record:
    """An answer to alpaca's instruction, or two in a list, the better one first."""
    output = row.values["output"]
    if not isinstance(output, list):
        return alpaca_answer(row)
    is_pair = len(output) == 2 and all(isinstance(text, str) for text in output)
    if not is_pair:
        raise BadRecord(
            f"{row.origin}: output is neither a string nor a list of two, the better "
            "one first."
        )
    chosen, rejected = (fields.as_turn(text, "assistant") for text in output)
    return _pair(row, instruction_turns(row), chosen, rejected)


def alpaca_answer(row: Row) -> Record:
    """An answer to alpaca's instruction."""
    return make_record(row, instruction_turns(row), [turn(row, "output")])


def sharegpt(column: str) -> Callable[[Row], Record]:
    """A reader of the last turn of the conversation in `column`."""

    def read(row: Row) -> Record:
        messages = as_messages(row.values[column], column, row.origin)
        prompt, answer = split_last_turn(messages, column, row.origin)
        fields.checked_completion(answer, column, row.origin)
        return make_record(row, prompt, [answer])

    return read


def judged(read: Callable[[Row], Record], label: str) -> Callable[[Row], Record]:
    """A reader of one completion that `label` says is good or bad."""

    def judge(row: Row) -> Record:
        is_good = fields.flag(row, label, "for a good completion", "for a bad one")
        return read(row)._replace(scores=(float(is_good),))

    return judge
