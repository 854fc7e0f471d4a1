"""Preference data to records: reading, cutting into splits, mixing, converting.

`load_records` is what a run calls. Files are `dpojax.data.files`' concern, columns
`dpojax.data.formats`', and what one kind of supervision is made from another
`dpojax.data.conversions`'.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from dpojax.data.bad_records import BadRecord, BadRecords, usable
from dpojax.data.conversions import (
    NUM_ACCEPTED,
    REJECTION_BETA,
    ConversionCounts,
    PairsFrom,
    as_kind,
)
from dpojax.data.fields import Kind, Record, Row
from dpojax.data.files import checked_row, read_splits
from dpojax.data.formats import as_record, rename_columns

_MOST_TIMES = 1000  # that a record is repeated


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
    read = partial(
        read_records,
        split=split,
        columns=columns,
        test_size=test_size,
        max_examples=max_examples,
        bad=bad,
    )
    mixed: list[Record] = []
    for source, weight in _with_weights(sources, weights):
        mixed += weigh(read(source), weight)
    return as_kind(
        mixed,
        kind,
        pairs_from=pairs_from,
        beta=beta,
        num_accepted=num_accepted,
        seed=seed,
        needs_scores=needs_scores,
        bad=bad,
    )


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
    if not 0 <= test_size < math.inf:
        raise ValueError(
            f"test_size is {test_size}; it must not be negative, but a number."
        )
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples is {max_examples}; it must be positive.")
    splits = read_splits(source)
    if bad is None:  # wherever it is
        for part in splits.values():
            usable(checked_row, part, None)
    # A lone "train" is all there is: taken whole, it would hold the test split too.
    whole = splits.keys() not in ({None}, {"train"})
    if whole and split not in splits:
        raise ValueError(
            f"{source} has no split {split!r}; it has {', '.join(map(str, splits))}."
        )
    rows = splits[split] if whole else next(iter(splits.values()))
    if max_examples is not None and max_examples < len(rows):
        order = np.random.default_rng(0).permutation(len(rows))
        rows = [rows[index] for index in sorted(order[:max_examples])]
    if not whole:
        rows = _cut(rows, source, split, test_size)
    if not rows:
        raise ValueError(
            f"{source} has no examples in its split {split!r}; "
            "give other data or another test_size."
        )
    if bad is not None:
        bad.count(len(rows))

    def read(row: Row | BadRecord) -> Record:
        return as_record(rename_columns(checked_row(row), columns or {}))

    return usable(read, rows, bad)


def weigh(records: Sequence[Record], weight: float) -> list[Record]:
    """Repeats records, or keeps a share of them, in their order.

    Args:
      records: of one data set.
      weight: 2.5 gives every record twice and half of them, chosen at random, once
        more; 0.3 keeps three in ten. The choice is the same every time.

    Raises:
      ValueError: if `weight` is not positive, or so small that no record is left.
    """
    if not 0 < weight <= _MOST_TIMES:
        raise ValueError(
            f"A data set's weight is {weight}; it must be positive, and at most "
            f"{_MOST_TIMES}."
        )
    times, share = divmod(weight, 1)
    order = np.random.default_rng(0).permutation(len(records))
    more = sorted(order[: round(share * len(records))])
    weighed = list(records) * int(times) + [records[index] for index in more]
    if not weighed:
        raise ValueError(
            f"A weight of {weight} leaves none of {len(records)} records; give a "
            "larger weight or leave the data set out."
        )
    return weighed


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


def _cut(
    rows: list[Row | BadRecord], source: str, split: str, test_size: float
) -> list[Row | BadRecord]:
    if split not in ("train", "test"):
        raise ValueError(
            f"{source} has no split {split!r}; 'train' and 'test' can be cut off it."
        )
    wanted = test_size * len(rows) if test_size < 1 else test_size
    num_test = min(len(rows), round(wanted))
    order = np.random.default_rng(0).permutation(len(rows))
    chosen = order[:num_test] if split == "test" else order[num_test:]
    return [rows[index] for index in sorted(chosen)]
