"""From one kind of supervision to another: what a set of records can also be.

A pair can be two judged answers, a ranking a pair, and so on; what cannot be known is
refused. This file knows neither where records come from nor tokens.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    records: Iterable[Record],
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
    conversion = Conversion(
        records,
        kind,
        pairs_from=pairs_from,
        beta=beta,
        num_accepted=num_accepted,
        seed=seed,
        needs_scores=needs_scores,
        bad=bad,
    )
    return list(conversion), conversion.counts


class Conversion:
    """Records of one kind, made of those of any kind one after another; see `as_kind`.

    What depends on all of them, as the counts do, is known when all are gone through.
    """

    def __init__(
        self,
        records: Iterable[Record],
        kind: Kind,
        *,
        pairs_from: PairsFrom = "best_worst",
        beta: float = REJECTION_BETA,
        num_accepted: int = NUM_ACCEPTED,
        seed: int = 0,
        needs_scores: bool = False,
        bad: BadRecords | None = None,
    ):
        """Takes what `as_kind` takes, and goes through no record yet."""
        _check(pairs_from, beta, num_accepted)
        self._records = records
        self._kind: Kind = kind
        self._pairs_from: PairsFrom = pairs_from
        self._beta, self._num_accepted, self._seed = beta, num_accepted, seed
        self._needs_scores, self._bad = needs_scores, bad
        self._tally: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Record]:
        """Goes through the records; raises what `as_kind` raises."""
        self._tally.clear()
        records = usable(self._checked, self._records, self._bad)
        for index, record in enumerate(records):
            self._tally["read"] += 1
            for converted in self._convert(index, record):
                self._tally["records"] += 1
                yield converted
        self._check_all()

    @property
    def counts(self) -> ConversionCounts:
        """What became of the records so far."""
        return ConversionCounts(*(self._tally[n] for n in ConversionCounts._fields))

    def _checked(self, record: Record) -> Record:
        """The record, if it can be of that kind."""
        kinds = record.kind, self._kind
        if kinds in _REFUSALS:
            raise BadRecord(
                f"{record.origin} is {record.kind!r} and {self._kind!r} is needed; "
                f"{_REFUSALS[kinds]}."
            )
        if self._kind == "pair" and self._needs_scores and record.scores is None:
            raise BadRecord(
                f"{record.origin} is a pair without scores, which this loss needs; "
                "give a margin or the scores of chosen and rejected, or use another "
                "loss."
            )
        return record

    def _convert(self, index: int, record: Record) -> list[Record]:
        kind, tally = self._kind, self._tally
        is_ranked = record.kind == "ranked"
        if is_ranked and kind == "pair":
            tally["ranked"] += 1
            random = np.random.default_rng((self._seed, index))
            converted = list(self._pairs(record, random))
        else:
            converted = _CONVERSIONS[record.kind, kind](record)
        if not converted:
            tally["dropped_ties" if is_ranked else "dropped_undesirable"] += 1
        if kind == "pair" and self._needs_scores:
            ordered = [pair for pair in converted if _is_ordered(pair)]
            tally["dropped_misordered"] += len(converted) - len(ordered)
            converted = ordered
        return converted

    def _pairs(self, record: Record, random: np.random.Generator) -> Iterator[Record]:
        places = _choose_pairs(
            record, self._pairs_from, self._beta, self._num_accepted, random
        )
        return _as_pairs(record, places, shared=self._pairs_from == "all")

    def _check_all(self) -> None:
        if self._pairs_from != "best_worst" and not self._tally["ranked"]:
            raise ValueError(
                f"pairs_from is {self._pairs_from!r}, but no ranking is made into "
                "pairs here; leave it out."
            )
        counts = self.counts
        if not counts.records:
            raise ValueError(
                f"Of {counts.read} records none is left as {self._kind!r}: "
                f"{counts.dropped_ties} are ties, {counts.dropped_undesirable} "
                f"undesirable and {counts.dropped_misordered} have a chosen score that "
                "is not the larger one."
            )


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


def _check(pairs_from: PairsFrom, beta: float, num_accepted: int) -> None:
    if pairs_from not in ("best_worst", "all", "rso"):
        raise ValueError(
            f"pairs_from is {pairs_from!r}; it must be 'best_worst', 'all' or 'rso'."
        )
    if not beta > 0 or num_accepted < 2:
        raise ValueError(
            f"Rejection sampling has beta {beta} and accepts {num_accepted}; beta must "
            "be positive, and two or more must be accepted to make a pair."
        )


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
