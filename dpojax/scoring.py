"""The score command: a reward model's scores of given completions, as JSON Lines.

A completion's score does not depend on what else it is compared with: prompts are cut
for each completion by itself. This file knows no training.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import metrics
from dpojax.batch import Batch
from dpojax.command_config import ScoreConfig
from dpojax.connecting import connect
from dpojax.data.bad_records import BadRecords, describe_skipped, usable
from dpojax.data.chats import render
from dpojax.data.loader import packed_batches
from dpojax.data.packing import Example
from dpojax.data.records import Record, read_records
from dpojax.data.tokenize import tokenize_records
from dpojax.loading import (
    Loaded,
    as_reward_examples,
    check_positions,
    load_reward_model,
)
from dpojax.placing import Keeping
from dpojax.processes import gathered
from dpojax.progress import say, show_table, track
from dpojax.rewards import completion_rewards
from dpojax.sharding import Placement, make_mesh, make_placement
from dpojax.train_step import Apply, Params
from dpojax.whole_files import new_file, write_json_lines

ScoreStep = Callable[[Params, Batch], jax.Array]
Scored = tuple[Record, tuple[float, ...]]


def score(config: ScoreConfig) -> Path:
    """Scores every completion of the data; of pairs, says how well they are ranked."""
    connect(config.distributed)
    output = new_file(config.output)
    if config.batch_size < 1:
        raise ValueError(f"batch_size is {config.batch_size}; it must be positive.")
    mesh = make_mesh(**vars(config.mesh))
    loaded = load_reward_model(config.model, Keeping(mesh, config.compute_dtype))
    check_positions(loaded, config.max_length)
    records = _read(config, loaded)
    examples = _as_examples(records, loaded, config.max_length)
    scores = score_examples(
        make_score_step(loaded.model.apply),
        loaded.params,
        examples,
        batch_size=config.batch_size,
        placement=make_placement(mesh),
    )
    in_order = iter([value for values in scores for value in values])
    scored = [
        (record, tuple(islice(in_order, len(record.completions)))) for record in records
    ]
    write_json_lines(output, _as_rows(scored))
    say(f"{output}: the completions of {len(records):,} prompts, scored")
    _show_accuracy(scored)
    return output


def make_score_step(apply: Apply) -> ScoreStep:
    """Builds ``score_step(params, batch) -> [rows, slots, completions]``, jitted."""

    def score_step(params: Params, batch: Batch) -> jax.Array:
        hidden, head = apply(params, batch)
        return completion_rewards(hidden, head, batch)

    return jax.jit(score_step)


def score_examples(
    step: ScoreStep,
    params: Params,
    examples: Sequence[Example],
    *,
    batch_size: int,
    placement: Placement,
) -> list[tuple[float, ...]]:
    """Scores of the completions of each example, in the order given.

    Args:
      step: the scoring step.
      params: the reward model.
      examples: their completions end where the model reads its score.
      batch_size: examples scored at one time, about.
      placement: how rows reach the devices.
    """
    scores: list[tuple[float, ...]] = [()] * len(examples)
    with track("Scoring", total=-(-len(examples) // batch_size)) as advance:
        for rows, batch in packed_batches(examples, batch_size, placement.num_shards):
            rewards = gathered(step(params, placement.put(batch)))
            for row, places in enumerate(rows):
                for slot, place in enumerate(places):
                    count = len(examples[place].completions)
                    scores[place] = tuple(rewards[row, slot, :count].tolist())
            advance("")
    return scores


def ranking_accuracy(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How often the first of two scores is the higher one, and by how much.

    Args:
      pairs: scores of the preferred and of the other completion.

    Returns:
      ``rewards/accuracies``, where a tie counts one half, and ``rewards/margins``, each
      with its standard error as ``_se``.
    """
    chosen, rejected = jnp.asarray(pairs, jnp.float32).T
    margin, every = chosen - rejected, jnp.ones(len(pairs), bool)
    return metrics.summarize(
        {
            "rewards/accuracies": metrics.moments((1 + jnp.sign(margin)) / 2, every),
            "rewards/margins": metrics.moments(margin, every),
        }
    )


def _read(config: ScoreConfig, loaded: Loaded) -> list[Record]:
    """All of a split that can be used; nothing is cut off data that has none."""
    bad = BadRecords() if config.on_bad_record == "skip" else None
    records = read_records(
        config.data,
        split=config.split,
        columns=config.columns,
        test_size=0,
        max_examples=config.max_examples,
        bad=bad,
    )
    if bad is None:
        return records

    def rendered(record: Record) -> Record:
        """All completions of a record are scored, or none."""
        render(record, loaded.tokenizer)
        return record

    records = list(usable(rendered, records, bad))
    if bad.of_split(config.split).reasons:
        say(describe_skipped(bad.of_split(config.split)))
    return records


def _as_examples(
    records: Sequence[Record], loaded: Loaded, max_length: int
) -> list[Example]:
    """Examples whose completions are those of the records, one after another."""
    singles = [
        record._replace(completions=(completion,), scores=None)
        for record in records
        for completion in record.completions
    ]
    examples, counts = tokenize_records(
        singles, loaded.tokenizer, max_length=max_length
    )
    assert len(examples) == len(singles)  # too long ones are cut, none is dropped
    cut = f"{counts.truncated_prompts} prompts cut, {counts.truncated_completions} ends"
    say(f"{len(records):,} prompts, {len(singles):,} completions; {cut}")
    pieces = iter(examples)
    grouped = [
        example
        for record in records
        for example in _share_prompt(list(islice(pieces, len(record.completions))))
    ]
    return as_reward_examples(grouped, loaded)


def _share_prompt(pieces: list[Example]) -> list[Example]:
    """One example of one prompt, unless the prompt was cut differently."""
    prompt = pieces[0].prompt
    if not all(np.array_equal(piece.prompt, prompt) for piece in pieces):
        return pieces
    return [Example(prompt, tuple(piece.completions[0] for piece in pieces))]


def _show_accuracy(scored: Sequence[Scored]) -> None:
    """Where the data are pairs: the accuracy with which they are ranked."""
    pairs = list(_preferred_first(scored))
    if not pairs:
        return
    values = ranking_accuracy(pairs)
    rows = [
        (name, f"{values[name]:.4f}", f"{values[name + '_se']:.4f}")
        for name in values
        if name + "_se" in values
    ]
    title = f"{len(pairs):,} pairs as the reward model ranks them"
    show_table(title, ("", "mean", "standard error"), rows)


def _preferred_first(scored: Sequence[Scored]) -> Iterator[tuple[float, float]]:
    """Scores of each pair; of a rated one, the higher rated first.

    Equal ratings and identical completions say nothing and are left out.
    """
    for record, values in scored:
        if len(values) != 2 or record.completions[0] == record.completions[1]:
            continue
        first, second = record.scores or (1.0, 0.0)
        if first != second:
            yield (values[0], values[1]) if first > second else (values[1], values[0])


def _as_rows(scored: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    for record, values in scored:
        if not np.isfinite(values).all():
            raise ValueError(
                f"{record.origin}: the model's scores are {values}, which are not "
                "finite; look for damage in its weights."
            )
        texts = {"prompt": record.prompt, "completions": record.completions}
        yield texts | {"scores": values}
