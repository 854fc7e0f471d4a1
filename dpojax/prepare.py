"""What training and evaluating prepare alike: the loss by its settings, the examples.

This file knows neither the loop nor the model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import chain
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import optax

from dpojax.config import (
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
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
from dpojax.loading import NewAdapters
from dpojax.losses.make import Loss, make_loss, split_terms
from dpojax.losses.objective import Objective
from dpojax.losses.table import OBJECTIVES
from dpojax.measure import check_token_metrics
from dpojax.models.adapter_modules import choose_modules
from dpojax.models.lora import LoraShape
from dpojax.optimizer import make_optimizer, make_schedule
from dpojax.progress import Advance, say, track
from dpojax.reference import Params
from dpojax.reference_setting import check_reference
from dpojax.token_cache import Prepared, default_root, load, make_key
from dpojax.user_code import load_names

_SHOWN_TOGETHER = 1_000  # records by which a bar moves on


def make_configured_loss(config: LossConfig) -> Loss:
    """The loss that settings name, the user's own included.

    Raises:
      ValueError: for a name or setting that there is not, naming the nearest.
    """
    settings = {
        name: value
        for name, value in vars(config).items()
        if name != "name" and value is not None
    }
    own = {
        name: _load_objective(name)
        for _, name in split_terms(config.name)
        if ":" in name
    }
    return make_loss(config.name, OBJECTIVES | own, **settings)


def check_training(config: TrainConfig, loss: Loss) -> None:
    """Refuses settings that cannot work, whatever the model and data.

    Raises:
      ValueError: naming the setting, its value and what is allowed.
    """
    if config.model is None or not config.data:
        missing = "--model" if config.model is None else "--data"
        raise ValueError(f"Training needs a model and data; {missing} is missing.")
    check_settings(config, loss)


def check_settings(config: TrainConfig, loss: Loss) -> None:
    """The same, wherever the model and data come from."""
    _check_numbers(config)
    check_reference(config, loss)
    check_token_metrics(config.token_metrics, loss.needs)
    if config.batch_size == 1 and "mismatched" in loss.needs:
        raise ValueError(
            f"The loss {loss.name!r} compares each example with another of its batch; "
            "batch_size must be at least 2."
        )
    if config.epochs is not None and config.steps is not None:
        raise ValueError("Give the length of the run by --epochs or --steps, not both.")
    positive = ("batch_size", "microbatches", "chunk_size", "log_every",
                "evaluate_every", "save_every", "keep_last")  # fmt: skip
    optional = ("epochs", "steps", "stop_after", "max_examples", "row_length")
    settings = vars(config)
    for name in positive + optional:
        if settings[name] is not None and settings[name] <= 0:
            raise ValueError(f"{name} is {settings[name]}; it must be positive.")
    if config.seed < 0:
        raise ValueError(f"seed is {config.seed}; it must not be negative.")
    if config.epochs is not None and not math.isfinite(config.epochs):
        raise ValueError(f"epochs is {config.epochs}; it must be a finite number.")
    if config.sample_prompts < 0 or config.sample_tokens < 1:
        raise ValueError(
            f"{config.sample_tokens} tokens of {config.sample_prompts} prompts cannot "
            "be sampled; neither may be negative, and at least one token is needed."
        )


# A seed may be a time; positions of a row stand in memory, all of them.
_LARGEST: dict[str, int] = {"seed": 1 << 63, "row_length": 1 << 24}
_LARGEST_FLOAT = 3.4e38  # of 32 bits


def _check_numbers(config: object, within: str = "") -> None:
    """Refuses what is infinite or no number, and what no array could be as large as."""
    for name, value in vars(config).items():
        if is_dataclass(value):
            _check_numbers(value, f"{within}{name}.")
        elif isinstance(value, float) and not abs(value) <= _LARGEST_FLOAT:
            raise ValueError(f"{within}{name} is {value}; it must be a finite number.")
        elif isinstance(value, int) and abs(value) >= _LARGEST.get(name, 1 << 31):
            raise ValueError(
                f"{within}{name} is {value}; it must be smaller than "
                f"{_LARGEST.get(name, 1 << 31):,}."
            )


def make_new_adapters(config: LoraConfig) -> NewAdapters | None:
    """What decides the adapters of a model from its shapes; None if it gets none.

    Raises:
      ValueError: for a rank, alpha or dropout that cannot be, or a setting of new
        adapters without a rank.
    """
    if not 0 <= config.dropout < 1:
        raise ValueError(f"lora.dropout is {config.dropout}; it must be in [0, 1).")
    if config.rank is None:
        names = ("alpha", "targets", "kind", "scaling")
        given = [name for name in names if vars(config)[name]]
        if given:
            raise ValueError(
                f"--lora.{given[0]} describes new adapters; it needs --lora.rank too."
            )
        return None
    alpha = 32.0 if config.alpha is None else config.alpha
    if config.rank < 1 or alpha <= 0:
        raise ValueError(
            f"lora.rank is {config.rank} and lora.alpha {alpha:g}; both must be "
            "positive."
        )

    def new_adapters(base: Params, settings: Mapping[str, Any]) -> LoraShape:
        assert config.rank is not None
        targets = config.targets or ("all-linear",)
        return LoraShape(
            modules=choose_modules(targets, base, settings),
            rank=config.rank,
            alpha=alpha,
            kind=config.kind or "lora",
            scaling=config.scaling or "standard",
        )

    return new_adapters


def configured_schedule(
    config: OptimizerConfig, default_rate: float, num_steps: int
) -> optax.Schedule:
    """The learning rate at each step of a run."""
    warmup, rate = config.warmup_steps, config.learning_rate
    return make_schedule(
        config.schedule,
        learning_rate=default_rate if rate is None else rate,
        num_steps=num_steps,
        warmup_steps=math.ceil(warmup * num_steps if warmup < 1 else warmup),
    )


def configured_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The optimiser that settings name."""
    return make_optimizer(
        config.name,
        schedule,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=config.epsilon,
        moments=config.moments,
    )


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
        return Prepared(examples, conversion.counts, counts, left_out, writer.hashes())

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


def _load_objective(name: str) -> Objective:
    """A row of the table from ``file.py:name``; a bare function is a loss of pairs."""
    path, _, key = name.rpartition(":")
    names = load_names(Path(path), "loss")
    value = names.get(key)
    if isinstance(value, Objective):
        return value
    if not isinstance(value, FunctionType):
        others = [
            other
            for other, thing in names.items()
            if isinstance(thing, Objective | FunctionType)
        ]
        raise ValueError(
            f"{path} has no loss {key!r}; it has {', '.join(others) or 'none'}."
        )
    return Objective(value, "", path)


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
