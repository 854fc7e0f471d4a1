"""The rows of a step: those of a run's own data, or of stated lengths.

Rows are planned as training plans them. This file knows neither models nor programs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpojax.batch import Batch
from dpojax.bench_inputs import make_pairs
from dpojax.command_config import BenchConfig, PlanConfig
from dpojax.data.loader import training_batches
from dpojax.data.packing import Example
from dpojax.examples import load_split
from dpojax.loading import Loaded, as_reward_examples
from dpojax.losses.make import Loss
from dpojax.reference_setting import named_reference

_MOST_BATCHES = 8  # of made-up examples, by which rows are planned


class Rows(NamedTuple):
    """Examples, and how many there are in all."""

    examples: Sequence[Example]
    num_examples: int | None  # of the data set; None: not known
    source: str


def plan_examples(config: PlanConfig, loss: Loss, loaded: Loaded) -> Rows:
    """The examples that rows are planned for.

    Raises:
      ValueError: if neither lengths nor data are given, or a loss needs data.
    """
    if config.reads_data:
        examples = load_split(config, loss, loaded.tokenizer, config.train_split)
        source, number = ", ".join(config.data), len(examples)
    else:
        examples = _stated(config, loss, loaded.model.config.vocabulary_size)
        spread = f", spread {config.spread:g}" if config.spread else ""
        source = (
            f"prompts of {config.prompt_tokens} and completions of "
            f"{config.completion_tokens} tokens{spread}"
        )
        number = config.num_examples
    if "reward_head" in loss.needs:
        examples = as_reward_examples(examples, loaded)
    if named_reference(config.reference).is_precomputed:
        examples = [_with_reference(example) for example in examples]
    return Rows(examples, number, source)


def first_batch(config: PlanConfig, loss: Loss, rows: Rows, num_shards: int) -> Batch:
    """The batch of the first step, on the host.

    Args:
      config: the settings.
      loss: the objective.
      rows: the examples.
      num_shards: ways in which rows are divided.
    """
    number = max(config.batch_size, len(rows.examples))
    return next(
        training_batches(
            rows.examples,
            batch_size=config.batch_size,
            num_seen=number,
            seed=config.seed,
            start=0,
            stop=1,
            row_multiple=config.microbatches * num_shards,
            row_length=config.row_length,
            mismatch_within=config.max_length if "mismatched" in loss.needs else None,
        )
    )


def scored_chunks(
    batch: Batch, num_shards: int, num_parts: int, chunk: int, num_contexts: int = 1
) -> float:
    """Chunks of scored positions of a device's rows of a microbatch, on average.

    Args:
      batch: on the host.
      num_shards: ways in which rows are divided.
      num_parts: microbatches.
      chunk: positions of a chunk.
      num_contexts: parts into which a row's positions are divided.
    """
    rows = np.asarray(batch.scored).reshape(len(batch.scored), num_contexts, -1)
    scored = np.count_nonzero(rows, axis=2)
    parts = scored.reshape(num_shards, -1, num_parts, num_contexts).sum(axis=1)
    return float(np.mean(np.ceil(parts / chunk)))


def num_steps(config: PlanConfig, rows: Rows) -> int | None:
    """Steps of the run; None where the data set's size is not told."""
    if config.steps is not None:
        return config.steps
    if rows.num_examples is None:
        return None
    epochs = 1 if config.epochs is None else config.epochs
    return math.ceil(max(1, round(rows.num_examples * epochs)) / config.batch_size)


def _stated(config: PlanConfig, loss: Loss, vocabulary: int) -> list[Example]:
    if config.prompt_tokens is None or config.completion_tokens is None:
        raise ValueError(
            "The rows of a step follow from lengths; give --prompt-tokens and "
            "--completion-tokens, their means, or --data that is here."
        )
    if loss.kind not in ("pair", "single", "judged") or "score" in loss.needs:
        raise ValueError(
            f"The loss {loss.name!r} needs more than prompts, completions and labels; "
            "give --data that is here."
        )
    num_batches = _MOST_BATCHES if config.spread else 1
    made = BenchConfig(
        batch_size=config.batch_size,
        steps=num_batches,
        unmeasured_steps=0,
        prompt_tokens=config.prompt_tokens,
        completion_tokens=config.completion_tokens,
        spread=config.spread,
        seed=config.seed,
    )
    pairs = make_pairs(made, vocabulary)
    if loss.kind == "pair":
        return pairs
    labels = [(float(place % 2),) for place in range(len(pairs))]
    return [
        Example(
            pair.prompt,
            pair.completions[:1],
            scores=label if loss.kind == "judged" else None,
        )
        for pair, label in zip(pairs, labels, strict=True)
    ]


def _with_reference(example: Example) -> Example:
    numbers = (0.0,) * len(example.completions)
    return example._replace(reference=numbers, reference_prefix=numbers)
