"""The embedded reviews: grammar, exact reward, pairs and tokenizer.

Knows the public functions of `dpojax.data.synthetic` only, and trains nothing.
"""

import re

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpojax.data.labels import label_pairs, rank_completions
from dpojax.data.synthetic import (
    REWARD_RANGE,
    make_openings,
    make_reviews,
    make_tokenizer,
    reward,
    split_review,
)


@pytest.fixture(scope="module")
def reviews() -> list[str]:
    return make_reviews(2000, seed=0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def as_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_same_seed_gives_the_same_reviews_and_a_larger_count_continues_them():
    assert make_reviews(50, seed=3) == make_reviews(80, seed=3)[:50]


def test_another_seed_gives_other_reviews():
    assert not set(make_reviews(50, seed=3)) & set(make_reviews(50, seed=4))


def test_reviews_have_three_to_five_sentences(reviews: list[str]):
    counts = {len(re.findall(r"\.(?: |$)", review)) for review in reviews}
    assert counts == {3, 4, 5}


def test_reviews_are_clean_text_with_agreeing_articles(reviews: list[str]):
    for review in reviews:
        assert re.fullmatch(r"[A-Z][a-z]*(,? [A-Za-z]+|\. [A-Z][a-z]*)*\.", review)
        assert not re.search(r"\ba [aeiouAEIOU]|\ban [^aeiouAEIOU]", review)


def test_a_connective_tells_whether_the_next_clause_has_the_same_sign(
    reviews: list[str],
):
    pattern = r"The (?:\w+ ){1,5}\w+, (?:and|but) the [\w ]+\."
    clauses = [found for review in reviews for found in re.findall(pattern, review)]
    assert len(clauses) > 200
    for clause in clauses:
        left, right = re.split(", (?:and|but) ", clause)
        same_sign = reward(left) * reward(right) > 0
        assert same_sign == (", and " in clause)


def test_pronouns_agree_with_the_named_person(reviews: list[str]):
    women = {"Anna", "Maria", "Julia", "Sofia", "Grace", "Nadia"}
    named = [r for r in reviews if re.search(r"called \w+, and s?he ", r)]
    assert len(named) > 100
    for review in named:
        found = re.search(r"called (\w+), and (s?he) ", review)
        assert found is not None
        assert (found[1] in women) == (found[2] == "she")
        assert not re.search(r"\bHe " if found[2] == "she" else r"\bShe ", review)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("The plot was set in Boston.", 0.0),
        ("   \n42 §§ ,,", 0.0),
        ("good", 1 / 2),
        ("The plot was dull.", -1 / 2),
        ("The plot was not dull.", 1 / 2),
        ("Never boring", 1 / 2),
        ("It was not very good.", -1 / 2),
        ("It was not very really good.", 1 / 2),
        ("It was never a good plot.", 1 / 2),
        ("Was it? Not. Good.", 1 / 2),
        ("It was not not good.", -1 / 2),
        ("very good", 1 / 2),
        ("I did not enjoy it, but my sister loved it.", 0.0),
        ("I would never recommend it.", -1 / 2),
        ("Good, great and lovely, but tedious.", 2 / 5),
        ("GOOD good GoOd", 3 / 4),
        ("goodness dullness", 0.0),
    ],
)
def test_reward_by_hand(text: str, expected: float):
    """(p - n) / (p + n + 1), where a negator flips the opinion word right after it.

    One intensifier may stand between; a mark, an article or a second one breaks it.
    "Good, great and lovely, but tedious": p = 3 and n = 1, so 2 / 5.
    """
    assert reward(text) == pytest.approx(expected, abs=1e-12)


def test_reward_stays_inside_its_range_however_often_an_opinion_is_repeated():
    low, high = REWARD_RANGE
    assert (low, high) == (-1.0, 1.0)
    assert low < reward("awful " * 5000) < -0.999
    assert high > reward("superb " * 5000) > 0.999


def test_reviews_are_mixed_and_balanced(reviews: list[str]):
    rewards = np.array([reward(review) for review in reviews])
    assert abs(rewards.mean()) < 0.1
    assert rewards.std() > 0.3
    assert len(np.unique(rewards)) > 15


def test_split_review_cuts_before_a_space_after_four_to_eight_words(reviews: list[str]):
    for review in reviews:
        opening, rest = split_review(review)
        assert opening + rest == review
        assert rest[0] == " " and rest[1].isalpha()
        assert 4 <= len(opening.split()) <= 8


def test_an_opening_holds_no_opinion(reviews: list[str]):
    for review in reviews:
        opening, rest = split_review(review)
        assert reward(opening) == 0.0
        assert reward(rest) == reward(review)


def test_split_review_refuses_a_text_without_a_subject():
    with pytest.raises(ValueError, match="names no thing"):
        split_review("Nothing to see here.")


def test_openings_are_those_of_the_reviews_of_the_seed_and_vary(reviews: list[str]):
    openings = make_openings(2000, seed=0)
    assert openings == [split_review(review)[0] for review in reviews]
    assert len(set(openings)) > 1000


def test_label_pairs_prefers_the_higher_reward_and_drops_ties():
    openings = ["I saw this film", "I read a book", "I saw an opera"]
    completions = [
        [" and it was dull.", " at home.", " and it was good."],
        [" and it was not dull.", " and it was great."],
        [" on Friday."],
    ]
    assert label_pairs(openings, completions) == [
        {
            "prompt": "I saw this film",
            "chosen": " and it was good.",
            "rejected": " and it was dull.",
            "chosen_score": 0.5,
            "rejected_score": -0.5,
        }
    ]
    ranking = rank_completions(openings, completions)
    assert [record["scores"] for record in ranking] == [[-0.5, 0.0, 0.5]]


def test_label_pairs_refuses_lists_that_do_not_match():
    with pytest.raises(ValueError, match="one list"):
        label_pairs(["I saw this film"], [])


def test_the_vocabulary_is_small_and_known_words_are_all_there_is(
    reviews: list[str], tokenizer: PreTrainedTokenizerFast
):
    assert 400 <= len(tokenizer) <= 700
    seen = {token for review in reviews for token in as_ids(tokenizer, review)}
    assert tokenizer.unk_token_id not in seen
    special = set(tokenizer.all_special_ids)
    assert len(special) == 4
    assert seen | special == set(range(len(tokenizer)))


def test_reviews_have_25_to_60_tokens_on_average(
    reviews: list[str], tokenizer: PreTrainedTokenizerFast
):
    lengths = [len(as_ids(tokenizer, review)) for review in reviews]
    assert 25 <= np.mean(lengths) <= 60
    assert max(lengths) < 80


def test_decoding_the_ids_gives_the_review_back(
    reviews: list[str], tokenizer: PreTrainedTokenizerFast
):
    for review in reviews:
        assert tokenizer.decode(as_ids(tokenizer, review)) == review


def test_the_ids_of_opening_and_rest_are_the_ids_of_the_review(
    reviews: list[str], tokenizer: PreTrainedTokenizerFast
):
    for review in reviews[:500]:
        opening, rest = split_review(review)
        parts = as_ids(tokenizer, opening) + as_ids(tokenizer, rest)
        assert parts == as_ids(tokenizer, review)
        assert tokenizer.decode(as_ids(tokenizer, rest)) == rest


def test_the_tokenizer_adds_a_bos_and_nothing_else(tokenizer: PreTrainedTokenizerFast):
    ids = as_ids(tokenizer, "Yesterday I saw this film")
    assert tokenizer.encode("Yesterday I saw this film") == [
        tokenizer.bos_token_id,
        *ids,
    ]
    assert len(ids) == 5
    assert tokenizer.encode("") == [tokenizer.bos_token_id]


def test_a_word_outside_the_grammar_is_one_unknown_token(
    tokenizer: PreTrainedTokenizerFast,
):
    ids = as_ids(tokenizer, "Yesterday I saw this zeppelin")
    assert [token == tokenizer.unk_token_id for token in ids] == [False] * 4 + [True]


def test_the_tokenizer_survives_saving_and_loading(
    tmp_path, reviews: list[str], tokenizer: PreTrainedTokenizerFast
):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    for review in reviews[:100]:
        ids = loaded.encode(review)
        assert ids == tokenizer.encode(review)
        assert loaded.decode(ids, skip_special_tokens=True) == review
        assert loaded.decode(ids[1:]) == review
