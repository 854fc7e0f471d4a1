"""IFEval's rules by hand, each both ways, and the bootstrap between two policies."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "experiments" / "ifeval"


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def rules() -> Any:
    return import_module("instructions")


def accuracy() -> Any:
    return import_module("accuracy")


CASES = [  # kind, settings, followed, not followed
    ("keywords:existence", {"keywords": ["farmer", "hay"]}, "A Farmer. Hay!", "Hay."),
    (
        "keywords:frequency",
        {"keyword": "peace", "frequency": 2, "relation": "at least"},
        "Peace and peace.",
        "One peace.",
    ),
    (
        "keywords:frequency",
        {"keyword": "peace", "frequency": 2, "relation": "less than"},
        "One peace.",
        "Peace and peace.",
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["kill"]},
        "A skill, and killing time.",
        "Kill time.",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "t", "let_frequency": 3, "let_relation": "at least"},
        "That time",
        "The time",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "Dr. Who met Mr. T. on a train.",
        "He came. She left.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        'He came. "Who?" She left!',
        "It costs 3.50 dollars. Or 4.",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "One.\n***\nTwo.\n***\n",
        "One.\n\nTwo.",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "One.***Two.",
        "One.***   ***Two.",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        "It's so.",
        "So, so.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "president"},
        'One.\n\n"President, come!',
        "President.\n\nCome.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "it"},
        "It is.\n\nSo.",
        "It is.\n\nSo.\n\nTrue.",
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name], [address]",
        "[name] lives",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "Bye.\nP. S. I will write.",
        "Bye.\nPS I will write.",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        "Bye.\nP.P.S I will write.",
        "Bye.\nP.S. I will write.",
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* one\n- two\n**bold**",
        "* one\n- two\n- three",
    ),
    (
        "detectable_format:constrained_response",
        {},
        "My answer is maybe.",
        "My answer is perhaps.",
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*one* and **two**",
        "*one* and ** **",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1\nRest.\nDay 2\nRest.",
        "Day 1\nRest. Another day.",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Peace>>\nOnce", "<< >>\nOnce"),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One.\n******\nOne."),
    (
        "combination:two_responses",
        {},
        "One.******Two.******",
        "One.******Two.******Three.",
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem."},
        "write a poem. Roses",
        "Roses. Write a poem.",
    ),
    (
        "startend:end_checker",
        {"end_phrase": "in India."},
        '"We live in India."',
        "We live in India. Yes.",
    ),
    ("startend:quotation", {}, ' "All of it." ', '"All" of it.'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA and the ESA",
        "NASA and Esa",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "NASA and Esa",
        "NASA and the ESA",
    ),
    ("punctuation:no_comma", {}, "One and two.", "One, two."),
]
LANGUAGES = [
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein sehr schöner Tag, und wir gehen spazieren.",
        "This is a very beautiful day and we go for a walk.",
    ),
    (
        "change_case:english_capital",
        {},
        "THIS IS A VERY BEAUTIFUL DAY AND WE GO FOR A WALK.",
        "This IS A VERY BEAUTIFUL DAY AND WE GO FOR A WALK.",
    ),
    (
        "change_case:english_lowercase",
        {},
        "this is a very beautiful day and we go for a walk.",
        "das ist ein sehr schöner tag und wir gehen spazieren.",
    ),
]


@pytest.mark.parametrize(("kind", "settings", "right", "wrong"), CASES)
def test_a_rule_tells_what_follows_from_what_does_not(
    kind: str, settings: dict[str, Any], right: str, wrong: str
) -> None:
    rule = rules().RULES[kind]
    assert rule(right, **settings)
    assert not rule(wrong, **settings)


@pytest.mark.parametrize(("kind", "settings", "right", "wrong"), LANGUAGES)
def test_a_rule_of_language_tells_too(
    kind: str, settings: dict[str, Any], right: str, wrong: str
) -> None:
    pytest.importorskip("langdetect", reason="of the extra experiments")
    rule = rules().RULES[kind]
    assert rule(right, **settings)
    assert not rule(wrong, **settings)


def test_every_kind_of_instruction_has_an_example() -> None:
    assert len(rules().RULES) == 25
    assert {case[0] for case in (*CASES, *LANGUAGES)} == set(rules().RULES)


def test_a_relation_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="'at least' or 'less than'"):
        rules().compare(1, "at most", 2)


def test_loose_accuracy_forgives_a_first_line_and_stars_and_nothing_empty() -> None:
    row = {
        "instruction_id_list": ["startend:quotation", "punctuation:no_comma"],
        "kwargs": [{}, {}],
    }
    judged = accuracy().judge(row, 'Sure, here:\n*"All of it."*')
    assert judged.strict == [False, False]
    assert judged.loose == [True, True]
    empty = accuracy().judge(row, " ")
    assert empty.strict == empty.loose == [False, False]


def counts(flags: list[list[bool]]) -> Any:
    module = accuracy()
    return module.count([module.Followed(some, some) for some in flags])


def test_a_prompt_counts_once_where_all_of_its_instructions_are_followed() -> None:
    """Two prompts of three instructions, two followed: 1/2 of prompts, 2/3 of them."""
    found = accuracy().accuracy(counts([[True, False], [True]]))
    assert found == pytest.approx([1 / 2, 2 / 3, 1 / 2, 2 / 3])


def test_policies_that_follow_the_same_differ_by_nothing() -> None:
    one = counts([[True, False], [True], [False]] * 20)
    assert np.all(accuracy().difference_interval(one, one) == 0)


def test_a_difference_is_the_other_policy_less_the_first() -> None:
    worse = counts([[False]] * 30 + [[True]] * 70)
    better = counts([[True]] * 100)
    low, high = accuracy().difference_interval(worse, better)
    assert np.all((low > 0.15) & (low < 0.3) & (high > 0.3) & (high < 0.45))


def test_the_interval_is_that_of_paired_prompts() -> None:
    """The share of 100 that differ is 0.1: its error is 0.03, 1.96 of it each way.

    Unpaired, with half of the prompts followed, the bounds would be 0.27 apart.
    """
    one = counts([[True]] * 40 + [[False]] * 60)
    other = counts([[True]] * 50 + [[False]] * 50)
    low, high = accuracy().difference_interval(one, other)
    assert high - low == pytest.approx(2 * 1.96 * 0.03, abs=0.015)
