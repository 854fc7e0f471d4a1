"""The examples that settings name: read, converted, tokenised, kept for the next time.

This file knows neither the loop nor the model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from dpojax.config import TrainConfig
from dpojax.data.bad_records import (
    BadRecords,
    OnBadRecord,
    Skipped,
    describe_skipped,
)
from dpojax.data.conversions import Conversion
from dpojax.data.fields import Record
from dpojax.data.flat_examples import ExampleWriter
from dpojax.data.packing import Example
from dpojax.data.records import select_records
from dpojax.data.tokenize import Tokenizer, describe, tokenize_records
from dpojax.losses.make import Loss
from dpojax.progress import Advance, say, track
from dpojax.token_cache import Prepared, default_root, load, make_key

_SHOWN_TOGETHER = 1_000  # records by which a bar moves on


def load_examples(
    sources: Sequence[str],
    loss: Loss,
    tokenizer: Tokenizer,
    *,
    split: str,
    weights: Sequence[float] | None = None,
    columns: Mapping[str, str] | None = None,
    test_size: float = 0.05,
    max_examples: int | None = None,
    pairs_from: Literal["best_worst", "all", "rso"] = "best_worst",
    rejection_beta: float = 0.5,
    max_length: int = 1024,
    too_long: Literal["truncate", "drop"] = "truncate",
    turns: Literal["all", "assistant"] = "all",
    on_bad_record: OnBadRecord = "stop",
    skipped: list[Skipped] | None = None,
) -> Sequence[Example]:
    """Reads, converts and tokenises what a loss takes, and says what was left out.

    Takes what `dpojax.data.records.load_records` and
    `dpojax.data.tokenize.tokenize_records` take. Bad records that are left out, where
    there are any, are added to `skipped`. Large data is kept as it is prepared, see
    `dpojax.token_cache`.
    """
    selected = {
        "split": split,
        "weights": weights or None,
        "columns": columns,
        "test_size": test_size,
        "max_examples": max_examples,
    }
    converted = {
        "kind": loss.kind,
        "pairs_from": pairs_from,
        "beta": rejection_beta,
        "needs_scores": "score" in loss.needs,
    }
    tokenized = {"max_length": max_length, "too_long": too_long, "turns": turns}
    bad = BadRecords() if on_bad_record == "skip" else None
    selections = select_records(sources, **selected, bad=bad)

    def prepare(directory: Path | None) -> Prepared:
        if bad is not None:
            bad.clear()
        num_rows = sum(map(len, selections))
        with track(f"Preparing {split}", total=num_rows) as advance:
            records = _counted(chain.from_iterable(selections), advance)
            conversion = Conversion(records, **converted, bad=bad)
            writer = ExampleWriter(directory)
            examples, counts = tokenize_records(
                conversion, tokenizer, writer=writer, bad=bad, **tokenized
            )
        left_out = Skipped(split, (), 0) if bad is None else bad.of_split(split)
        return Prepared(examples, conversion.counts, counts, left_out)

    files = [selection.files for selection in selections]
    settings = selected | converted | tokenized | {"on_bad_record": on_bad_record}
    if bad is not None:
        settings |= {"sources": list(sources)}  # which are named where one is bad
    prepared = load(default_root(), make_key(files, tokenizer, settings), prepare)
    examples = prepared.examples
    say(f"{split}: {describe(prepared.conversion)}; {describe(prepared.counts)}")
    if prepared.skipped.reasons:
        say(describe_skipped(prepared.skipped))
        if skipped is not None:
            skipped.append(prepared.skipped)
    _check_probabilities(loss, examples)
    return examples


def _counted(records: Iterable[Record], advance: Advance) -> Iterator[Record]:
    for number, record in enumerate(records, start=1):
        yield record
        if number % _SHOWN_TOGETHER == 0:
            advance("", _SHOWN_TOGETHER)


def load_split(
    config: TrainConfig,
    loss: Loss,
    tokenizer: Tokenizer,
    split: str,
    skipped: list[Skipped] | None = None,
) -> Sequence[Example]:
    """The examples of a split of a run's data, see `load_examples`."""
    return load_examples(
        config.data,
        loss,
        tokenizer,
        split=split,
        # What is held out stands once, however often training repeats it.
        weights=config.data_weights if split == config.train_split else None,
        columns=config.columns,
        test_size=config.test_size,
        max_examples=config.max_examples,
        pairs_from=config.pairs_from,
        rejection_beta=config.rejection_beta,
        max_length=config.max_length,
        too_long=config.too_long,
        turns=config.turns,
        on_bad_record=config.on_bad_record,
        skipped=skipped,
    )


def balance_advice(loss: Loss, examples: Sequence[Example]) -> str | None:
    """What to change where KTO's weighted classes are out of the paper's bounds.

    References:
      Ethayarajh et al., KTO, 2024, arXiv:2402.01306, eq. 8.
    """
    for term in loss.terms:
        if "desirable_weight" in term.settings:
            labels = [example.scores[0] > 0.5 for example in examples if example.scores]
            good, bad = sum(labels), len(labels) - sum(labels)
            up = float(term.settings["desirable_weight"]) * good
            down = float(term.settings["undesirable_weight"]) * bad
            if not down <= up <= 1.5 * down:
                return (
                    f"{good:,} desirable and {bad:,} undesirable completions weigh "
                    f"{up:,.0f} to {down:,.0f}; KTO's paper keeps the ratio between 1 "
                    "and 1.5: set --loss.desirable-weight or --loss.undesirable-weight."
                )
    return None


def _check_probabilities(loss: Loss, examples: Sequence[Example]) -> None:
    if all(term.name != "sppo" for term in loss.terms):
        return
    scores = [score for example in examples for score in example.scores or ()]
    if scores and not 0 <= min(scores) <= max(scores) <= 1:
        raise ValueError(
            f"sppo takes win probabilities as scores, and these range from "
            f"{min(scores):g} to {max(scores):g}; give probabilities in [0, 1], or use "
            "another loss."
        )
