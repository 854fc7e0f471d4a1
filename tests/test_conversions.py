"""What records of one kind become as another, what is left out, what is refused.

Knows the public functions of `dpojax.data.conversions`; the last tests go from a pair
to batches, and read real files beside the project.
"""

import math
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data.conversions import ConversionCounts, PairsFrom, accept, as_kind
from dpojax.data.fields import Kind, Record
from dpojax.data.loader import training_batches
from dpojax.data.packing import Example
from dpojax.data.records import read_records

ORIGIN = "data.jsonl, line 7"
TOOLS = [{"type": "function", "function": {"name": "look"}}]

SINGLE = Record("p", ("c",), ORIGIN)
PAIR = Record("p", ("c", "r"), ORIGIN, weight=2.0, tools=TOOLS)
SCORED = PAIR._replace(scores=(7.0, 2.5))
GOOD = Record("p", ("c",), ORIGIN, scores=(1.0,), weight=2.0)
BAD = GOOD._replace(scores=(0.0,))
RANKED = Record("p", ("a", "b", "c", "d"), ORIGIN, (1.0, 3.0, 3.0, 0.5), weight=2.0)
TIED = Record("p", ("a", "b"), ORIGIN, (2.0, 2.0), by_score=True)


def converted(record: Record, kind: Kind, **settings: Any) -> list[Record]:
    found, counts = as_kind([record], kind, **settings)
    assert counts == ConversionCounts(1, len(found), 0, 0, 0)
    assert all(one.kind == kind for one in found)
    return found


def refusal(records: list[Record], kind: Kind, **settings: Any) -> str:
    """The one sentence with which a conversion is refused."""
    with pytest.raises(ValueError) as refused:
        as_kind(records, kind, **settings)
    message = str(refused.value)
    assert "\n" not in message and ". " not in message
    return message


@pytest.mark.parametrize("record", [SINGLE, PAIR, SCORED, GOOD, BAD, RANKED, TIED])
def test_a_record_of_the_wanted_kind_stays_as_it_is(record: Record):
    assert converted(record, record.kind) == [record]


def test_a_pair_is_two_judged_completions_that_carry_its_weight():
    good, bad = converted(SCORED, "judged")
    assert good == SCORED._replace(completions=("c",), scores=(1.0,))
    assert bad == SCORED._replace(completions=("r",), scores=(0.0,))


@pytest.mark.parametrize("pair", [PAIR, SCORED])
def test_the_chosen_completion_of_a_pair_can_stand_alone(pair: Record):
    assert converted(pair, "single") == [PAIR._replace(completions=("c",))]


def test_a_pair_is_a_ranking_of_two_by_its_scores_or_else_of_one_and_zero():
    (ranked,) = converted(PAIR, "ranked")
    assert ranked == PAIR._replace(scores=(1.0, 0.0), by_score=True)
    (ranked,) = converted(SCORED, "ranked")
    assert ranked == SCORED._replace(by_score=True)


def test_the_good_completions_stand_alone_and_the_bad_ones_are_counted():
    found, counts = as_kind([GOOD, BAD, GOOD], "single")
    assert found == [GOOD._replace(scores=None)] * 2
    assert counts == ConversionCounts(3, 2, 0, dropped_undesirable=1,
                                      dropped_misordered=0)  # fmt: skip


def test_the_best_of_a_ranking_stands_alone_the_first_among_ties():
    assert converted(RANKED, "single") == [
        RANKED._replace(completions=("b",), scores=None)
    ]
    assert converted(TIED, "single")[0].completions == ("a",)


def test_the_best_and_the_worst_of_a_ranking_are_a_pair_with_their_scores():
    assert converted(RANKED, "pair") == [
        RANKED._replace(completions=("b", "d"), scores=(3.0, 0.5))
    ]


@pytest.mark.parametrize("pairs_from", get_args(PairsFrom))
def test_two_ranked_completions_are_a_pair_the_better_one_first(pairs_from: PairsFrom):
    two = Record("p", ("a", "b"), ORIGIN, (1.0, 2.0), by_score=True)
    (pair,) = converted(two, "pair", pairs_from=pairs_from)
    assert (pair.completions, pair.scores) == (("b", "a"), (2.0, 1.0))


@pytest.mark.parametrize("pairs_from", get_args(PairsFrom))
def test_a_ranking_of_ties_is_no_pair_and_counted(pairs_from: PairsFrom):
    found, counts = as_kind([TIED, RANKED], "pair", pairs_from=pairs_from)
    assert counts == ConversionCounts(2, len(found), 1, 0, 0)


def test_all_pairs_of_different_scores_share_the_weight_of_their_ranking():
    pairs = converted(RANKED, "pair", pairs_from="all")
    assert [(pair.completions, pair.scores) for pair in pairs] == [
        (("b", "a"), (3.0, 1.0)),
        (("c", "a"), (3.0, 1.0)),
        (("a", "d"), (1.0, 0.5)),
        (("b", "d"), (3.0, 0.5)),
        (("c", "d"), (3.0, 0.5)),
    ]
    assert {pair.weight for pair in pairs} == {2.0 / 5}


# -- Rejection sampling --------------------------------------------------------------

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12)


@given(scores=SCORES, seed=st.integers(0, 99), beta=st.floats(0.05, 50))
def test_pairs_by_rejection_are_disjoint_ordered_and_the_same_for_the_same_seed(
    scores: list[float], seed: int, beta: float
):
    names = tuple(f"c{place}" for place in range(len(scores)))
    record = Record("p", names, ORIGIN, tuple(scores), by_score=True)
    other = Record("q", ("x", "y"), ORIGIN, (1.0, 0.0), by_score=True)
    settings: Any = {"pairs_from": "rso", "beta": beta, "seed": seed}
    settings["num_accepted"] = 6
    pairs = as_kind([record, other], "pair", **settings)[0]
    assert pairs == as_kind([record, other], "pair", **settings)[0]
    mine = [pair for pair in pairs if pair.prompt == "p"]
    used = [str(name) for pair in mine for name in pair.completions]
    assert len(used) == len({*used}) <= min(6, len(scores))
    for pair in mine:
        assert pair.scores is not None and pair.weight == 1.0
        assert pair.scores[0] > pair.scores[1]
        places = [names.index(str(name)) for name in pair.completions]
        assert tuple(scores[place] for place in places) == pair.scores


def accepted(scores: list[float], beta: float, num_accepted: int = 1) -> Counter[int]:
    """How often each completion is accepted in two thousand draws."""
    random = np.random.default_rng(0)
    found: Counter[int] = Counter()
    for _ in range(2000):
        some = accept(scores, beta=beta, num_accepted=num_accepted, random=random)
        assert len(some) == len({*some}) == min(num_accepted, len(scores))
        found.update(some)
    return found


def test_a_small_beta_accepts_the_best_ones_and_no_other():
    scores = [0.0, 3.0, 1.0, 2.0]
    assert accepted(scores, 1e-6) == {1: 2000}
    assert accepted(scores, 1e-6, num_accepted=2) == {1: 2000, 3: 2000}


def test_an_infinite_beta_accepts_any_completion_equally_often():
    """2000 draws of one in four: 500, with a standard deviation of 19."""
    found = accepted([0.0, 3.0, 1.0, 2.0], math.inf)
    assert all(abs(found[place] - 500) < 80 for place in range(4))


def test_a_higher_score_is_accepted_more_often():
    found = accepted([0.0, 3.0, 1.0, 2.0], 1.0)
    assert found[0] < found[2] < found[3] < found[1]


def test_of_two_completions_the_worse_is_first_as_often_as_the_rule_says():
    """By hand: acceptance of the worse has q = exp(-1) where beta is the difference.

    In a round's random order the worse one stands before the better with probability
    1/2 and is then accepted with probability q; the better one is accepted in the
    first round anyhow. So it is first in q/2 = 0.184 of the draws, 368 of 2000.
    """
    found = accepted([1.0, 0.0], 1.0)
    assert abs(found[1] - 368) < 75


def test_all_are_accepted_where_there_are_no_more_than_wanted():
    assert accepted([0.0, 50.0, 100.0], 0.5, num_accepted=8) == dict.fromkeys(
        range(3), 2000
    )


# -- Scores of pairs -----------------------------------------------------------------


def test_pairs_whose_chosen_does_not_score_higher_are_dropped_where_scores_count():
    equal, swapped = (SCORED._replace(scores=s) for s in ((2.0, 2.0), (1.0, 2.0)))
    records = [equal, SCORED, swapped, RANKED]
    found, counts = as_kind(records, "pair", needs_scores=True)
    assert [pair.scores for pair in found] == [(7.0, 2.5), (3.0, 0.5)]
    assert counts == ConversionCounts(4, 2, 0, 0, dropped_misordered=2)
    assert as_kind(records, "pair")[1] == ConversionCounts(4, 4, 0, 0, 0)


def test_a_pair_without_scores_is_refused_where_scores_count():
    message = refusal([SCORED, PAIR], "pair", needs_scores=True)
    assert message.startswith(f"{ORIGIN} is a pair without scores")


# -- What is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "kind", "advice"),
    [
        (SINGLE, "pair", "fits only 'single'"),
        (SINGLE, "judged", "fits only 'single'"),
        (SINGLE, "ranked", "fits only 'single'"),
        (GOOD, "pair", "use a loss of 'judged' data"),
        (BAD, "ranked", "use a loss of 'judged' data"),
        (RANKED, "judged", "use a loss of 'ranked', 'pair' or 'single' data"),
    ],
)
def test_what_cannot_be_known_is_refused_with_both_kinds(
    record: Record, kind: Kind, advice: str
):
    message = refusal([record], kind)
    assert message.startswith(f"{ORIGIN} is {record.kind!r} and {kind!r} is needed;")
    assert advice in message


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"pairs_from": "best"}, "pairs_from is 'best'; it must be 'best_worst',"),
        ({"beta": 0.0}, "Rejection sampling has beta 0.0"),
        ({"beta": math.nan}, "Rejection sampling has beta nan"),
        ({"num_accepted": 1}, "accepts 1; beta must be positive, and two or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], reason: str):
    assert reason in refusal([RANKED], "pair", **settings)


@pytest.mark.parametrize(
    ("record", "kind"), [(PAIR, "pair"), (RANKED, "single"), (RANKED, "ranked")]
)
def test_a_way_to_make_pairs_is_refused_where_none_are_made(record: Record, kind: Kind):
    message = refusal([record], kind, pairs_from="all")
    assert message.startswith("pairs_from is 'all', but no ranking is made into pairs")


def test_nothing_left_is_refused_with_the_counts():
    assert "none is left as 'single': 0 are ties, 2 undes" in refusal(
        [BAD] * 2, "single"
    )
    assert "Of 1 records none is left as 'pair': 1 are ties" in refusal([TIED], "pair")
    swapped = SCORED._replace(scores=(1.0, 2.0))
    message = refusal([swapped], "pair", needs_scores=True)
    assert "1 have a chosen score that is not the larger one" in message


# -- Batches, and real files ---------------------------------------------------------


def test_the_batches_of_pairs_that_were_judged_are_mixed():
    """The loader shuffles the whole set, so good and bad need not alternate.

    Of 64 completions, half of them good, a batch of 16 with none of one kind has a
    probability below 1e-5.
    """
    pairs = [Record(f"p{n}", ("c", "r"), ORIGIN) for n in range(32)]
    judged, _ = as_kind(pairs, "judged")
    tokens = np.array([5], np.int32)
    examples = [Example(tokens, (tokens,), record.scores) for record in judged]
    batches = list(
        training_batches(examples, batch_size=16, num_seen=128, seed=0, start=0, stop=8)
    )
    shares = [batch.score[batch.live[..., None]].mean() for batch in batches]
    assert len(shares) == 8 and np.mean(shares) == 0.5
    assert all(0.1 < share < 0.9 for share in shares)


@pytest.mark.parametrize(
    ("name", "pairs_from", "records", "ties"),
    [
        ("imdb_scored_completions_odpo", "best_worst", 252, 0),
        ("tldr_scored_summaries_odpo_train", "best_worst", 567, 2),
        ("tldr_scored_summaries_odpo_train", "all", 10_097, 2),
    ],
)
def test_real_rankings_become_pairs(
    shared: Path, name: str, pairs_from: PairsFrom, records: int, ties: int
):
    path = shared / "data" / f"{name}.jsonl.gz"
    ranked = read_records(str(path), split="train", test_size=0)
    pairs, counts = as_kind(ranked, "pair", pairs_from=pairs_from, needs_scores=True)
    assert (counts.records, counts.dropped_ties) == (records, ties)
    differing = sum(
        any(a != b for a, b in combinations(record.scores or (), 2))
        for record in ranked
    )
    assert sum(pair.weight for pair in pairs) == pytest.approx(differing)


def test_real_labels_leave_the_good_completions(shared: Path):
    path = shared / "data" / "gsm8k_test_solution_labels.jsonl.gz"
    judged = read_records(str(path), split="train", test_size=0)
    good, counts = as_kind(judged, "single")
    assert (len(good), counts.dropped_undesirable) == (1994, 3274)
