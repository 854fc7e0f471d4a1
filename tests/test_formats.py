"""Every format that rows come in, by a small row of each, and what is refused.

Knows the public functions of `dpojax.data.formats`, and real files beside the project.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data.fields import Kind, Record, Row
from dpojax.data.formats import COLUMNS, FORMATS, as_record, rename_columns
from dpojax.data.prompts import split_shared
from dpojax.data.records import read_records

ORIGIN = "data.jsonl, line 7"


def record_of(**row: Any) -> Record:
    return as_record(Row(row, ORIGIN))


def refusal(**row: Any) -> str:
    """The one sentence with which a row is refused."""
    with pytest.raises(ValueError) as refused:
        record_of(**row)
    message = str(refused.value)
    assert message.startswith(ORIGIN)
    assert "\n" not in message and ". " not in message and message.endswith(".")
    return message


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def said(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


ASKED = [user("Why?")]
GOOD, BAD = [assistant("Because.")], [assistant("No.")]
BRIEF = [system("Be brief."), *ASKED]
TALK = [said("human", "Hi"), said("gpt", "Hello"), said("human", "Why?")]
TALKED = [user("Hi"), assistant("Hello"), user("Why?")]


def ultrafeedback(text: str, *ratings: str, **others: Any) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "truthfulness")
    annotations = {
        aspect: {"Rating": rating, "Rationale": "So."}
        for aspect, rating in zip(aspects, ratings, strict=False)
    }
    return {"response": text, "annotations": annotations, "model": "m", **others}


# A row, the kind that it is, its prompt, its completions and its scores.
ROWS: dict[str, tuple[dict[str, Any], Kind, Any, tuple[Any, ...], Any]] = {
    "explicit strings": (
        {"prompt": "p", "chosen": "c", "rejected": "r", "source": 3},
        "pair", "p", ("c", "r"), None,
    ),
    "explicit messages": (
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        "pair", ASKED, (GOOD, BAD), None,
    ),
    "messages that repeat their prompt": (
        {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        "pair", ASKED, (GOOD, BAD), None,
    ),
    "a string that begins the messages": (
        {
            "prompt": "Why?", "chosen": ASKED + GOOD, "rejected": ASKED + BAD,
            "messages": ASKED + GOOD, "score_chosen": 8.5, "score_rejected": 4,
        },
        "pair", ASKED, (GOOD, BAD), (8.5, 4.0),
    ),
    "a string that begins the messages after a system's": (
        {"prompt": "Why?", "chosen": BRIEF + GOOD, "rejected": BRIEF + BAD},
        "pair", BRIEF, (GOOD, BAD), None,
    ),
    "a system column": (
        {"system": "Be brief.", "prompt": "Why?", "chosen": "Because.",
         "rejected": "No."},
        "pair", BRIEF, (GOOD, BAD), None,
    ),
    "a system column of messages": (
        {"system": "Be brief.", "prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        "pair", BRIEF, (GOOD, BAD), None,
    ),
    "a system column that says what the messages say": (
        {"system": "Be brief.", "prompt": BRIEF, "chosen": GOOD, "rejected": BAD},
        "pair", BRIEF, (GOOD, BAD), None,
    ),
    "an empty system column": (
        {"system": "", "prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        "pair", ASKED, (GOOD, BAD), None,
    ),
    "a null system column": (
        {"system": None, "prompt": "p", "chosen": "c", "rejected": "r"},
        "pair", "p", ("c", "r"), None,
    ),
    "a margin": (
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1.5},
        "pair", "p", ("c", "r"), (1.5, 0.0),
    ),
    "implicit strings": (
        {"chosen": "The sky is blue", "rejected": "The sky is black"},
        "pair", "The sky is", (" blue", " black"), None,
    ),
    "implicit transcripts": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?"
            "\n\nAssistant: So it is",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?"
            "\n\nAssistant: So it is not",
        },
        "pair", "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:",
        (" So it is", " So it is not"), None,
    ),
    "implicit messages": (
        {"chosen": TALKED + GOOD, "rejected": TALKED + BAD},
        "pair", TALKED, (GOOD, BAD), None,
    ),
    "implicit messages that part at an earlier turn": (
        {"chosen": [*ASKED, *GOOD, user("And?"), *BAD], "rejected": ASKED + BAD},
        "pair", ASKED, ([*GOOD, user("And?"), *BAD], BAD), None,
    ),
    "implicit messages that part at a user's turn": (
        {
            "chosen": [*ASKED, *GOOD, user("And?"), *BAD],
            "rejected": [*ASKED, *GOOD, user("Or?"), *BAD],
        },
        "pair", ASKED,
        ([*GOOD, user("And?"), *BAD], [*GOOD, user("Or?"), *BAD]), None,
    ),
    "implicit messages that are the same": (
        {"chosen": ASKED + GOOD, "rejected": ASKED + GOOD, "prompt_id": "7"},
        "pair", ASKED, (GOOD, GOOD), None,
    ),
    "SHP where A is preferred": (
        {"history": "Why?", "human_ref_A": "Because.", "human_ref_B": "No.",
         "labels": 1, "score_A": 12, "score_B": 3},
        "pair", ASKED, (GOOD, BAD), (12.0, 3.0),
    ),
    "SHP where B is preferred": (
        {"history": "Why?", "human_ref_A": "No.", "human_ref_B": "Because.",
         "labels": 0, "score_A": 3, "score_B": 12},
        "pair", ASKED, (GOOD, BAD), (12.0, 3.0),
    ),
    "SHP without scores": (
        {"history": "Why?", "human_ref_A": "No.", "human_ref_B": "Because.",
         "labels": 0},
        "pair", ASKED, (GOOD, BAD), None,
    ),
    "Stack Exchange": (
        {"qid": 5, "question": "Why?", "response_j": "Because.", "response_k": "No."},
        "pair", ASKED, (GOOD, BAD), None,
    ),
    "Orca": (
        {"system": "Be brief.", "question": "Why?", "chosen": "Because.",
         "rejected": "No."},
        "pair", BRIEF, (GOOD, BAD), None,
    ),
    "distilabel pairs": (
        {
            "system": "", "input": "Why?", "chosen": "Because.", "rejected": "No.",
            "generations": ["No.", "Because."], "rating": [2, 9],
            "rating_chosen": 9, "rating_rejected": 2,
        },
        "pair", ASKED, (GOOD, BAD), (9.0, 2.0),
    ),
    "a question before messages that repeat it": (
        {"question": "Why?", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        "pair", ASKED, (GOOD, BAD), None,
    ),
    "distilabel ratings": (
        {"instruction": "Why?", "generations": ["No.", "Because."], "ratings": [2, 9]},
        "ranked", ASKED, (BAD, GOOD), (2.0, 9.0),
    ),
    "distilabel rating": (
        {"input": "Why?", "generations": ["No.", "Because."], "rating": [2, 9]},
        "ranked", ASKED, (BAD, GOOD), (2.0, 9.0),
    ),
    "sharegpt pairs": (
        {"conversations": TALK, "chosen": said("gpt", "Because."),
         "rejected": said("gpt", "No.")},
        "pair", TALKED, (GOOD, BAD), None,
    ),
    "sharegpt pairs of messages": (
        {"messages": TALKED, "chosen": GOOD[0], "rejected": BAD[0]},
        "pair", TALKED, (GOOD, BAD), None,
    ),
    "messages beside the conversations that they repeat": (
        {"messages": ASKED + GOOD, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        "pair", ASKED, (GOOD, BAD), None,
    ),
    "labelled sharegpt": (
        {"conversations": [*TALK, said("gpt", "Because.")], "kto_tag": True},
        "judged", TALKED, (GOOD,), (1.0,),
    ),
    "labelled messages": (
        {"messages": [*TALKED, *BAD], "kto_tag": False},
        "judged", TALKED, (BAD,), (0.0,),
    ),
    "sharegpt": (
        {"conversations": [said("system", "Be brief."), said("human", "Why?"),
                           said("gpt", "Because.")]},
        "single", BRIEF, (GOOD,), None,
    ),
    "sharegpt with a function's call": (
        {"conversations": [
            said("human", "Why?"),
            said("function_call", '{"name": "look", "arguments": {"at": "sky"}}'),
            said("observation", "blue"),
            said("gpt", "Because."),
        ]},
        "single",
        [
            *ASKED,
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function",
                 "function": {"name": "look", "arguments": {"at": "sky"}}}]},
            {"role": "tool", "content": "blue"},
        ],
        (GOOD,), None,
    ),
    "messages": ({"messages": BRIEF + GOOD}, "single", BRIEF, (GOOD,), None),
    "alpaca pairs": (
        {"instruction": "Translate.", "input": "Nein.", "chosen": "No.",
         "rejected": "Because."},
        "pair", [user("Translate.\nNein.")], (BAD, GOOD), None,
    ),
    "alpaca pairs in one list": (
        {"instruction": "Why?", "input": "", "output": ["Because.", "No."]},
        "pair", ASKED, (GOOD, BAD), None,
    ),
    "labelled alpaca": (
        {"instruction": "Why?", "output": "No.", "kto_tag": False},
        "judged", ASKED, (BAD,), (0.0,),
    ),
    "alpaca": (
        {"system": "Be brief.", "instruction": "Why?", "input": None, "output":
         "Because.", "history": None},
        "single", BRIEF, (GOOD,), None,
    ),
    "alpaca with earlier turns": (
        {"instruction": "Why?", "output": "Because.", "history": [["Hi", "Hello"]]},
        "single", TALKED, (GOOD,), None,
    ),
    "scored completions": (
        {"prompt": "p", "completions": ["a", "", "c"], "scores": [1, 2.5, 1]},
        "ranked", "p", ("a", "", "c"), (1.0, 2.5, 1.0),
    ),
    "two scored completions": (
        {"prompt": ASKED, "completions": [BAD, GOOD], "scores": [-1, 1]},
        "ranked", ASKED, (BAD, GOOD), (-1.0, 1.0),
    ),
    "Nectar": (
        {"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": [
            {"answer": "Because.", "rank": 1.0, "model": "m"},
            {"answer": "No.", "rank": 2.0, "model": "n"}]},
        "ranked", "\n\nHuman: Why?\n\nAssistant: ", ("Because.", "No."), (-1.0, -2.0),
    ),
    "UltraFeedback": (
        {"instruction": "Why?", "completions": [
            ultrafeedback("No.", "1", "2", "N/A", overall_score=10),
            ultrafeedback("Because.", "5", "4", "3", overall_score=8)]},
        "ranked", ASKED, (BAD, GOOD), (1.5, 4.0),
    ),
    "UltraFeedback with a missing rating": (
        {"instruction": "Why?", "completions": [
            ultrafeedback("No.", "N/A", overall_score=2.5),
            ultrafeedback("Because.", "5", overall_score=8)]},
        "ranked", ASKED, (BAD, GOOD), (2.5, 8.0),
    ),
    "Step-DPO": (
        {"prompt": "2 + 3 * 4?", "initial_reason_steps": "Step 1: It is 12.\nStep 2:",
         "chosen": " 14", "rejected": " 20", "answer": "14"},
        "pair", "2 + 3 * 4?\nStep 1: It is 12.\nStep 2:", (" 14", " 20"), None,
    ),
    "labelled strings": (
        {"prompt": "p", "completion": "c", "label": 1},
        "judged", "p", ("c",), (1.0,),
    ),
    "labelled messages and a prompt": (
        {"prompt": ASKED, "completion": BAD, "label": False},
        "judged", ASKED, (BAD,), (0.0,),
    ),
    "completions": (
        {"prompt": "p", "completion": "c", "chosen": "x"}, "single", "p", ("c",), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_format_becomes_a_record_of_its_kind(name: str):
    row, kind, prompt, completions, scores = ROWS[name]
    record = record_of(**row)
    assert record.kind == kind
    assert record.prompt == prompt
    assert record.completions == completions
    assert record.scores == scores
    assert (record.origin, record.weight, record.tools) == (ORIGIN, 1.0, None)


def test_every_format_of_the_table_has_a_row_here():
    tried = set()
    for row, *_ in ROWS.values():
        fits = (f for f in FORMATS if all(column in row for column in f.columns))
        tried.add(next(fits).columns)
    ratings = {f.columns for f in FORMATS if f.name == "distilabel ratings"}
    conversations = {f.columns for f in FORMATS if "conversations" in f.columns}
    assert {f.columns for f in FORMATS} - tried <= ratings | conversations


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("chosen_score", "rejected_score"),
        ("score_chosen", "score_rejected"),
        ("chosen_rating", "rejected_rating"),
        ("rating_chosen", "rating_rejected"),
    ],
)
def test_scores_of_a_pair_have_several_names_and_go_before_a_margin(
    chosen: str, rejected: str
):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 9}
    assert record_of(**pair, **{chosen: 7, rejected: 2.5}).scores == (7.0, 2.5)
    assert record_of(**pair, **{chosen: None, rejected: None}).scores == (9.0, 0.0)
    assert f"{rejected} is None" in refusal(**pair, **{chosen: 7})


@pytest.mark.parametrize("row", [row for row, kind, *_ in ROWS.values()])
def test_a_weight_is_carried_by_every_format(row: dict[str, Any]):
    assert record_of(**row, weight=2).weight == 2.0
    assert record_of(**row, weight=None).weight == 1.0


SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {}}}


def test_tools_are_a_list_or_json_of_one():
    pair = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    assert record_of(**pair, tools=[SCHEMA]).tools == [SCHEMA]
    assert record_of(**pair, tools=json.dumps([SCHEMA])).tools == [SCHEMA]
    for nothing in (None, "", " ", []):
        assert record_of(**pair, tools=nothing).tools is None


def test_the_nulls_that_a_table_fills_in_are_no_part_of_a_tool():
    filled = {**SCHEMA, "strict": None, "variants": [{"a": 1, "b": None}]}
    record = record_of(prompt=ASKED, chosen=GOOD, rejected=BAD, tools=[filled])
    assert record.tools == [{**SCHEMA, "variants": [{"a": 1}]}]


# -- What is refused ---------------------------------------------------------------

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
CHAT = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
LIST = {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}
LABELLED = {"prompt": "p", "completion": "c", "label": True}
SHP = {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
NAN = float("nan")

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({**PAIR, "chosen": " "}, ": chosen is empty; give a completion or remove"),
    ({**PAIR, "rejected": None}, ": rejected is neither a string nor a list of"),
    ({**CHAT, "prompt": "What?"}, " mixes strings and chat messages"),
    ({**CHAT, "rejected": "No."}, " mixes strings and chat messages"),
    ({"chosen": "a b", "rejected": GOOD}, " mixes strings and chat messages"),
    ({**LIST, "prompt": ASKED}, " mixes strings and chat messages"),
    ({"chosen": GOOD, "rejected": BAD}, ": chosen and rejected share no message"),
    ({"promt": "p", "chosen": "c", "rejected": "r"}, "(is 'promt' meant?)"),
    ({"chosen": "P\n\nAssistant: a", "rejected": "P\n\nAssistant:"},
     ": rejected is empty"),
    ({**PAIR, "margin": NAN}, ": margin is nan; it must be a finite number"),
    ({**PAIR, "margin": "3"}, ": margin is '3'; it must be a finite number"),
    ({**PAIR, "chosen_score": True, "rejected_score": 0}, ": chosen_score is True"),
    ({**PAIR, "weight": 0}, ": weight is 0; it must be positive"),
    ({**PAIR, "weight": float("inf")}, ": weight is inf; it must be a finite"),
    ({**PAIR, "tools": [SCHEMA]}, " has tools, which only a chat template can show"),
    ({**CHAT, "tools": "[{"}, ": tools is not JSON: "),
    ({**CHAT, "tools": ["look"]}, ": tools is neither a list of schemas nor JSON"),
    ({**CHAT, "tools": "3"}, ": tools is neither a list of schemas nor JSON"),
    ({**PAIR, "system": 3}, ": system is not a string"),
    ({**CHAT, "prompt": BRIEF, "system": "Be long."}, " has a system column and"),
    ({**LABELLED, "label": "desirable"}, ": label is 'desirable'; it must be true or"),
    ({**LABELLED, "label": "True"}, ": label is 'True'; it must be true or 1"),
    ({**LABELLED, "label": -1}, ": label is -1; it must be true or 1 for a good"),
    ({**LABELLED, "label": None}, ": label is None; it must be true or 1"),
    ({**SHP, "labels": 2}, ": labels is 2; it must be true or 1 where A is preferred"),
    ({**SHP, "score_A": 3}, ": score_B is None; it must be a finite number"),
    ({**SHP, "history": ASKED}, ": history is not a string"),
    ({**LIST, "completions": "ab"}, ": completions is not a list"),
    ({**LIST, "completions": ["a"], "scores": [1]}, ": completions has 1 completions,"),
    ({**LIST, "completions": ["a", 3]}, ": completions is neither a string nor"),
    ({**LIST, "scores": [1]}, ": scores has 1 for 2 completions; give one number"),
    ({**LIST, "scores": None}, ": scores has no list for 2 completions"),
    ({**LIST, "scores": [1, NAN]}, ": scores is nan; it must be a finite number"),
    ({**LIST, "scores": [1, "2"]}, ": scores is '2'; it must be a finite number"),
    ({"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"rank": 2}]},
     ": one of answers is not an object with 'answer' as a string"),
    ({"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
     ": rank is None; it must be a finite number"),
    ({"instruction": "i", "completions": [{"response": "a"}, {"response": "b"}]},
     ": overall_score is None; it must be a finite number"),
    ({"instruction": "i", "completions": []}, ": completions has 0 completions"),
    ({"instruction": "i", "output": ["a"]}, ": output is neither a string nor a list"),
    ({"instruction": "i", "output": ["a", " "]}, ": rejected is empty"),
    ({"instruction": "i", "output": "a", "history": ["Hi"]}, ": history is not a list"),
    ({"instruction": "i", "output": "a", "history": [["Hi", 3]]},
     ": history is not a string"),
    ({"conversations": []}, ": conversations is not a list of one or more messages"),
    ({"conversations": TALK}, ": conversations has 3 messages, the last one by 'user'"),
    ({"messages": GOOD}, ": messages has 1 messages, the last one by 'assistant'"),
    ({"messages": [*ASKED, assistant(" ")]}, ": messages is empty"),
    ({"conversations": [said("martian", "x")]},
     ": a message of conversations is by 'martian'; it must have a string as value"),
    ({"conversations": [said("human", "x"), said("function_call", "{")]},
     ": a function_call is not JSON: "),
    ({"conversations": [said("human", "x"), said("function_call", "[3]")]},
     ": a function_call names no function to call"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_row_that_a_format_does_not_allow_is_refused(
    row: dict[str, Any], reason: str
):
    assert reason in refusal(**row)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("prompt chosen rejectd", "no 'rejected'; it has prompt, chosen, rejectd (is"),
        ("prompt chosen", "no 'rejected'; it has prompt, chosen, and the nearest "
         "format, pairs, needs prompt, chosen, rejected"),
        ("question response_j", "no 'response_k'; it has question, response_j (is"),
        ("history human_ref_A labels", "no 'human_ref_B'"),
        ("prompt label", "no 'completion'; it has prompt, label, and the nearest "
         "format, labelled completions, needs prompt, completion, label"),
        ("xyz", "no 'prompt'; it has xyz."),
        ("", "no 'prompt'; it has nothing."),
    ],
)  # fmt: skip
def test_a_row_of_no_format_is_refused_with_the_nearest(names: str, expected: str):
    row = dict.fromkeys(names.split(), "x")
    assert refusal(**row).startswith(f"{ORIGIN} has {expected}")


# -- Columns of other names ---------------------------------------------------------


def test_columns_are_mapped_before_a_row_is_recognised():
    row = Row({"question": "q", "better": "c", "worse": "r", "chosen": 3}, ORIGIN)
    names = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    record = as_record(rename_columns(row, names))
    assert (record.prompt, record.completions) == ("q", ("c", "r"))
    assert rename_columns(row, {}) == row


def test_a_mapping_of_a_column_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=f"^{ORIGIN} has no 'questoin'; it has quest"):
        rename_columns(Row({"question": "q"}, ORIGIN), {"prompt": "questoin"})


def test_a_mapping_to_a_name_that_no_format_has_is_refused():
    message = "^No format has a column 'promt' .is 'prompt' meant.., so 'q' cannot be"
    with pytest.raises(ValueError, match=message):
        rename_columns(Row({"q": "q"}, ORIGIN), {"promt": "q"})
    assert {"prompt", "margin", "weight", "tools", "system", "kto_tag"} <= COLUMNS


# -- Prompts that are in the completions ---------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: why?\nyes", "Q: why?\nno", "Q: why?\n"),
        ("He ran", "He ran away", "He"),
        ("one two", "one  two", "one"),
        ("bluer", "blue", ""),
        ("yes", "no", ""),
        ("same words", "same words", "same"),
        ("same ", "same", ""),
        ("a\n\nAssistant: b c", "a\n\nAssistant: b d", "a\n\nAssistant:"),
    ],
)
def test_strings_are_split_at_a_word(chosen: str, rejected: str, prompt: str):
    expected = chosen[len(prompt) :], rejected[len(prompt) :]
    assert split_shared(chosen, rejected, ORIGIN) == (prompt, expected)


TEXTS = st.text("ab \n", min_size=1, max_size=12).filter(str.strip)


@given(shared=st.text("ab \n", max_size=12), chosen=TEXTS, rejected=TEXTS)
def test_a_split_loses_nothing_and_splits_no_word(
    shared: str, chosen: str, rejected: str
):
    prompt, completions = split_shared(shared + chosen, shared + rejected, ORIGIN)
    assert isinstance(prompt, str)
    for rest, end in zip(completions, (chosen, rejected), strict=True):
        assert isinstance(rest, str) and rest.strip()
        assert prompt + rest == shared + end
        assert not prompt or prompt[-1].isspace() or rest[0].isspace()


# -- Real files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("gsm8k_test_solution_labels", "judged", 5268),
        ("llamafactory_kto_en_demo", "judged", 300),
        ("llamafactory_dpo_en_demo", "pair", 300),
        ("imdb_scored_completions_odpo", "ranked", 252),
        ("tldr_scored_summaries_odpo_train", "ranked", 569),
        ("pandalm_human_pairs", "pair", 855),
        ("hh_harmless_base_test", "pair", 2303),
        ("blimp_pairs", "pair", 66993),
    ],
)
def test_a_real_file_is_read_whole(shared: Path, name: str, kind: Kind, count: int):
    path = shared / "data" / f"{name}.jsonl.gz"
    records = read_records(str(path), split="train", test_size=0)
    assert Counter(record.kind for record in records) == {kind: count}


def test_the_labels_and_the_numbers_of_completions_are_those_of_the_files(shared: Path):
    def read(name: str) -> list[Record]:
        path = shared / "data" / f"{name}.jsonl.gz"
        return read_records(str(path), split="train", test_size=0)

    labels = Counter(record.scores for record in read("llamafactory_kto_en_demo"))
    assert labels == {(1.0,): 150, (0.0,): 150}
    counts = Counter(len(r.completions) for r in read("imdb_scored_completions_odpo"))
    assert counts == {10: 249, 20: 2, 30: 1}
    sizes = {len(r.completions) for r in read("tldr_scored_summaries_odpo_train")}
    assert (min(sizes), max(sizes)) == (2, 8)


def test_whole_transcripts_are_split_where_the_file_splits_them(shared: Path):
    path = shared / "data" / "hh_harmless_base_test.jsonl.gz"
    for record in read_records(str(path), split="train", test_size=0):
        prompt, (chosen, rejected) = record.prompt, record.completions
        assert isinstance(prompt, str)
        whole = {"chosen": f"{prompt}{chosen}", "rejected": f"{prompt}{rejected}"}
        found = as_record(Row(whole, record.origin))
        assert found == record
