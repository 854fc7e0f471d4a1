"""Preference data to records: reading, cutting into splits, mixing, converting.

`select_records` and `dpojax.data.conversions.Conversion` are what a run calls: they
make a record when it is its turn, so that memory holds few of them, however many there
are. Files are `dpojax.data.files`' concern, columns `dpojax.data.formats`', and what
one kind of supervision is made from another `dpojax.data.conversions`'.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

from dpojax.data.bad_records import BadRecords
from dpojax.data.conversions import (
    NUM_ACCEPTED,
    REJECTION_BETA,
    ConversionCounts,
    PairsFrom,
    as_kind,
)
from dpojax.data.fields import Kind, Record
from dpojax.data.selection import Selection, select, weigh_places


def load_records(
    sources: Sequence[str],
    *,
    split: str,
    kind: Kind,
    weights: Sequence[float] | None = None,
    columns: Mapping[str, str] | None = None,
    test_size: float = 0.05,
    max_examples: int | None = None,
    pairs_from: PairsFrom = "best_worst",
    beta: float = REJECTION_BETA,
    num_accepted: int = NUM_ACCEPTED,
    seed: int = 0,
    needs_scores: bool = False,
    bad: BadRecords | None = None,
) -> tuple[list[Record], ConversionCounts]:
    """Reads one split of several data sets, mixes them and makes them of one kind.

    Args:
      sources: data sets as `read_records` takes them; `columns` holds for each.
      split: name of the split, usually ``"train"`` or ``"test"``.
      kind: what the objective takes.
      weights: how often each source's records stand, see `weigh`; by default once.
      columns: for a column's name in `dpojax.data.formats` its name in the data.
      test_size: what is cut off each source as its test split.
      max_examples: keep this many of each source.
      pairs_from: how rankings give pairs, see `as_kind`; so are the next three.
      beta: temperature of ``rso``.
      num_accepted: the most completions of a record that ``rso`` accepts.
      seed: of the draws of ``rso``.
      needs_scores: whether pairs must have scores, the chosen one's larger.
      bad: where bad records are noted, which are left out; None: the first one stops.

    Returns:
      The records, source by source, and the counts of what was left out.

    Raises:
      ValueError: as `read_records`, `weigh` and `as_kind` do.
    """
    return as_kind(
        chain.from_iterable(
            select_records(
                sources,
                split=split,
                weights=weights,
                columns=columns,
                test_size=test_size,
                max_examples=max_examples,
                bad=bad,
            )
        ),
        kind,
        pairs_from=pairs_from,
        beta=beta,
        num_accepted=num_accepted,
        seed=seed,
        needs_scores=needs_scores,
        bad=bad,
    )


def select_records(
    sources: Sequence[str],
    *,
    split: str,
    weights: Sequence[float] | None = None,
    columns: Mapping[str, str] | None = None,
    test_size: float = 0.05,
    max_examples: int | None = None,
    bad: BadRecords | None = None,
) -> list[Selection]:
    """One split of several data sets, none of whose rows is read yet.

    Takes what `load_records` takes; going through the records raises what it raises.
    """
    selected = partial(
        select,
        split=split,
        columns=columns,
        test_size=test_size,
        max_examples=max_examples,
        bad=bad,
    )
    return [
        selected(source).weigh(weight)
        for source, weight in _with_weights(sources, weights)
    ]


def read_records(
    source: str,
    *,
    split: str,
    columns: Mapping[str, str] | None = None,
    test_size: float = 0.05,
    max_examples: int | None = None,
    bad: BadRecords | None = None,
) -> list[Record]:
    """Reads one split of a data set.

    Data that has no splits, or only one called "train", is cut into "train" and "test":
    the same records every time, whatever else a run sets.

    Args:
      source: a ``.jsonl``, ``.json``, ``.parquet`` or ``.arrow`` file (JSON Lines also
        with ``.gz``), a directory saved by `datasets`, or a hub name.
      split: name of the split, usually ``"train"`` or ``"test"``.
      columns: for a column's name in `dpojax.data.formats` its name in the data.
      test_size: what is cut off as the test split: a share below 1, else a number.
      max_examples: keep this many, chosen at random, before anything is cut off.
      bad: as `load_records` takes it. What is left out was cut off and chosen like any
        other, so that the others do not depend on it.

    Returns:
      The records, in the order of the data, each of the kind that its columns say.

    Raises:
      ValueError: naming file and line for what cannot be read, and the columns or the
        splits there are for one that is missing.
    """
    return list(
        select(
            source,
            split=split,
            columns=columns,
            test_size=test_size,
            max_examples=max_examples,
            bad=bad,
        )
    )


def weigh(records: Sequence[Record], weight: float) -> list[Record]:
    """Repeats records or keeps a share of them, in their order, as `weigh_places`."""
    passes = weigh_places(len(records), weight)
    return [records[place] for places in passes for place in places]


def _with_weights(
    sources: Sequence[str], weights: Sequence[float] | None
) -> list[tuple[str, float]]:
    if isinstance(sources, str):
        raise ValueError(
            f"data is the string {sources!r}; give a tuple of names, ({sources!r},)."
        )
    if weights is None:
        weights = [1.0] * len(sources)
    if not sources or len(weights) != len(sources):
        raise ValueError(
            f"{len(sources)} data sets came with {len(weights)} weights; give at least "
            "one data set, and a weight for each or none at all."
        )
    return list(zip(sources, weights, strict=True))
