"""From one kind of supervision to another: what a set of records can also be.

A pair can be two judged answers, a ranking a pair, and so on; what cannot be known is
refused. This file knows neither where records come from nor tokens.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from dpojax.data.bad_records import BadRecord, BadRecords, usable
from dpojax.data.fields import Kind, Record

PairsFrom = Literal["best_worst", "all", "rso"]

# Liu et al. 2023, section 5: beta 0.5, and 8 of 64 candidates accepted.
REJECTION_BETA = 0.5
NUM_ACCEPTED = 8


class ConversionCounts(NamedTuple):
    """What became of the records that were read; shown before training."""

    read: int
    records: int
    dropped_ties: int  # rankings that gave no two completions of different scores
    dropped_undesirable: int  # bad answers, where good ones are to be made likely
    dropped_misordered: int  # pairs whose chosen does not score higher


def as_kind(
    records: Sequence[Record],
    kind: Kind,
    *,
    pairs_from: PairsFrom = "best_worst",
    beta: float = REJECTION_BETA,
    num_accepted: int = NUM_ACCEPTED,
    seed: int = 0,
    needs_scores: bool = False,
    bad: BadRecords | None = None,
) -> tuple[list[Record], ConversionCounts]:
    """Makes all records of one kind.

    A pair gives two judged records, good and bad; its chosen completion alone; or a
    ranking, with scores 1 and 0 where it has none. A good judged completion, and the
    best one of a ranking, can stand alone. A ranking gives pairs:

    * ``best_worst``: the best and the worst completion.
    * ``all``: every two whose scores differ; they share the record's weight.
    * ``rso``: rejection sampling (`accept`), and the accepted ones paired at random.

    Args:
      records: of any kinds.
      kind: what is wanted.
      pairs_from: how rankings give pairs.
      beta: temperature of ``rso``, in units of the scores.
      num_accepted: the most completions of a record that ``rso`` accepts.
      seed: of the draws of ``rso``.
      needs_scores: whether pairs must have scores, the chosen one's larger.
      bad: where records that cannot be of that kind are noted, which are left out;
        None: the first one stops.

    Returns:
      The records, in order, and the counts of what was left out.

    Raises:
      ValueError: naming the record that cannot be of that kind; if a setting cannot
        take effect; if no record is left.

    References:
      Liu et al. 2023, arXiv:2309.06657 (``rso``).
    """
    _check_sampling(pairs_from, beta, num_accepted)

    def checked(record: Record) -> Record:
        return _checked(record, kind, needs_scores)

    records = usable(checked, records, bad)
    _check_use(records, kind, pairs_from)
    found: list[Record] = []
    dropped: Counter[str] = Counter()
    for index, record in enumerate(records):
        if record.kind == "ranked" and kind == "pair":
            random = np.random.default_rng((seed, index))
            chosen = _choose_pairs(record, pairs_from, beta, num_accepted, random)
            converted = list(_as_pairs(record, chosen, shared=pairs_from == "all"))
        else:
            converted = _CONVERSIONS[record.kind, kind](record)
        if not converted:
            dropped["ties" if record.kind == "ranked" else "undesirable"] += 1
        if kind == "pair" and needs_scores:
            ordered = [pair for pair in converted if _is_ordered(pair)]
            dropped["misordered"] += len(converted) - len(ordered)
            converted = ordered
        found += converted
    return found, _count(len(records), len(found), kind, dropped)


def accept(
    scores: Sequence[float],
    *,
    beta: float,
    num_accepted: int,
    random: np.random.Generator,
) -> list[int]:
    """Statistical rejection sampling: draws from the policy that `scores` would shape.

    Round after round every completion that is not yet accepted is accepted with
    probability ``exp((score - largest) / beta)``, where the largest score is that of
    those left. A round takes them in random order: that of the data may say something.

    Args:
      scores: of each completion.
      beta: temperature; small takes the best first, large any.
      num_accepted: when to stop, if there are as many.
      random: where the draws come from.

    Returns:
      Places of the accepted completions, in the order in which they were.

    References:
      Liu et al. 2023, arXiv:2309.06657, Algorithm 1.
    """
    left = list(range(len(scores)))
    accepted: list[int] = []
    while left and len(accepted) < num_accepted:
        largest = max(scores[place] for place in left)
        for place in random.permutation(left).tolist():
            if random.uniform() < math.exp((scores[place] - largest) / beta):
                accepted.append(place)
        left = [place for place in left if place not in accepted]
    return accepted[:num_accepted]


def _check_sampling(pairs_from: PairsFrom, beta: float, num_accepted: int) -> None:
    if pairs_from not in ("best_worst", "all", "rso"):
        raise ValueError(
            f"pairs_from is {pairs_from!r}; it must be 'best_worst', 'all' or 'rso'."
        )
    if not beta > 0 or num_accepted < 2:
        raise ValueError(
            f"Rejection sampling has beta {beta} and accepts {num_accepted}; beta must "
            "be positive, and two or more must be accepted to make a pair."
        )


def _checked(record: Record, kind: Kind, needs_scores: bool) -> Record:
    """The record, if it can be of that kind."""
    if (record.kind, kind) in _REFUSALS:
        raise BadRecord(
            f"{record.origin} is {record.kind!r} and {kind!r} is needed; "
            f"{_REFUSALS[record.kind, kind]}."
        )
    if kind == "pair" and needs_scores and record.scores is None:
        raise BadRecord(
            f"{record.origin} is a pair without scores, which this loss needs; give a "
            "margin or the scores of chosen and rejected, or use another loss."
        )
    return record


def _check_use(records: Sequence[Record], kind: Kind, pairs_from: PairsFrom) -> None:
    is_used = kind == "pair" and any(record.kind == "ranked" for record in records)
    if pairs_from != "best_worst" and not is_used:
        raise ValueError(
            f"pairs_from is {pairs_from!r}, but no ranking is made into pairs here; "
            "leave it out."
        )


def _count(
    num_read: int, num_found: int, kind: Kind, dropped: Counter[str]
) -> ConversionCounts:
    names = ("ties", "undesirable", "misordered")
    counts = ConversionCounts(num_read, num_found, *(dropped[name] for name in names))
    if not num_found:
        raise ValueError(
            f"Of {num_read} records none is left as {kind!r}: {counts.dropped_ties} "
            f"are ties, {counts.dropped_undesirable} undesirable and "
            f"{counts.dropped_misordered} have a chosen score that is not the larger "
            "one."
        )
    return counts


def _choose_pairs(
    record: Record,
    pairs_from: PairsFrom,
    beta: float,
    num_accepted: int,
    random: np.random.Generator,
) -> list[tuple[int, int]]:
    """Two completions each, in any order."""
    scores = record.scores
    assert scores is not None
    if pairs_from == "best_worst":
        return [(scores.index(max(scores)), scores.index(min(scores)))]
    if pairs_from == "all":
        return list(combinations(range(len(scores)), 2))
    accepted = accept(scores, beta=beta, num_accepted=num_accepted, random=random)
    order = random.permutation(accepted).tolist()
    return list(zip(order[::2], order[1::2], strict=False))


def _as_pairs(
    record: Record, places: Sequence[tuple[int, int]], shared: bool
) -> Iterator[Record]:
    """The pairs at these places whose scores differ, the higher one first."""
    scores = record.scores
    assert scores is not None
    differing = [pair for pair in places if scores[pair[0]] != scores[pair[1]]]
    for pair in differing:
        ordered = sorted(pair, key=lambda place: -scores[place])
        yield record._replace(
            completions=tuple(record.completions[place] for place in ordered),
            scores=tuple(scores[place] for place in ordered),
            weight=record.weight / len(differing) if shared else record.weight,
            by_score=False,
        )


def _is_ordered(pair: Record) -> bool:
    assert pair.scores is not None
    return pair.scores[0] > pair.scores[1]


def _unchanged(record: Record) -> list[Record]:
    return [record]


def _judge_pair(record: Record) -> list[Record]:
    return [
        record._replace(completions=(completion,), scores=(score,))
        for completion, score in zip(record.completions, (1.0, 0.0), strict=True)
    ]


def _keep_first(record: Record) -> list[Record]:
    return [record._replace(completions=record.completions[:1], scores=None)]


def _keep_best(record: Record) -> list[Record]:
    assert record.scores is not None
    best = record.completions[record.scores.index(max(record.scores))]
    return [record._replace(completions=(best,), scores=None, by_score=False)]


def _keep_good(record: Record) -> list[Record]:
    return [record._replace(scores=None)] if record.scores == (1.0,) else []


def _rank_pair(record: Record) -> list[Record]:
    scores = (1.0, 0.0) if record.scores is None else record.scores
    return [record._replace(scores=scores, by_score=True)]


_CONVERSIONS: dict[tuple[Kind, Kind], Callable[[Record], list[Record]]] = {
    ("single", "single"): _unchanged,
    ("pair", "pair"): _unchanged,
    ("judged", "judged"): _unchanged,
    ("ranked", "ranked"): _unchanged,
    ("pair", "judged"): _judge_pair,
    ("pair", "single"): _keep_first,
    ("ranked", "single"): _keep_best,
    ("judged", "single"): _keep_good,
    ("pair", "ranked"): _rank_pair,
}

_NO_OTHER = "a completion with nothing to compare it to fits only 'single', as sft is"
_ONE_LABEL = (
    "a label for one completion does not compare two, so use a loss of 'judged' data, "
    "such as kto or bco, or 'single', such as sft"
)
_REFUSALS: dict[tuple[Kind, Kind], str] = {
    ("single", "pair"): _NO_OTHER,
    ("single", "judged"): _NO_OTHER,
    ("single", "ranked"): _NO_OTHER,
    ("judged", "pair"): _ONE_LABEL,
    ("judged", "ranked"): _ONE_LABEL,
    ("ranked", "judged"): (
        "no score says where good ends and bad begins, so use a loss of 'ranked', "
        "'pair' or 'single' data, or write a label for each completion"
    ),
}
