"""Held-out metrics, samples, and the KL of samples. Knows no files and no training."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import metrics
from dpojax.batch import Batch
from dpojax.completions import Settle
from dpojax.data.loader import packed_batches
from dpojax.data.packing import Example, as_batch, bucket_length
from dpojax.data.plan import Rows, round_up
from dpojax.generate import Watch, make_generate, pad_left, trim
from dpojax.loading import Loaded
from dpojax.processes import gathered
from dpojax.progress import track
from dpojax.sharding import Placement
from dpojax.spread import Spread
from dpojax.train_step import EvalStep, Params, make_kl_step
from dpojax.truncation import EVERY_TOKEN, Truncation

# (params, prompts, seed) -> completions, those of a prompt side by side; EOS ends what
# the model has ended
Sampler = Callable[[Params, Sequence[Sequence[int]], int], list[list[int]]]
# (params, reference, completions) -> their KL and its standard error
SampleKL = Callable[[Params, Params, Sequence[Sequence[int]]], dict[str, float]]

# Examples of which an evaluation keeps each one's own figures: enough for a histogram
# and for shares to within two per cent, and 40 kB an evaluation.
NUM_KEPT = 1_024


class Evaluation(NamedTuple):
    """What an evaluation finds."""

    values: dict[str, float]  # each mean, with its standard error as ``_se``
    figures: dict[str, list[float]]  # of each of the first examples, in their order


class Assessed(NamedTuple):
    """What evaluation steps say of all examples, still on the devices."""

    total: metrics.Sums
    kept: list[tuple[Rows, metrics.Sums]]  # figures of the first examples, by batch
    num_examples: int


def evaluate(
    step: EvalStep,
    params: Params,
    reference: Params | None,
    examples: Sequence[Example],
    *,
    batch_size: int,
    placement: Placement,
) -> Evaluation:
    """The metrics of all examples, and the first `NUM_KEPT` ones' own figures."""
    of_batch = partial(step, params, reference)
    assessed = assess_all(
        of_batch, examples, batch_size=batch_size, placement=placement
    )
    return conclude(assessed)


def assess_all(
    step: Callable[[Batch], tuple[metrics.Sums, metrics.Sums]],
    examples: Sequence[Example],
    *,
    batch_size: int,
    placement: Placement,
) -> Assessed:
    """Takes a step of each batch of all examples."""
    total: metrics.Sums | None = None
    kept: list[tuple[Rows, metrics.Sums]] = []
    with track("Evaluating", total=-(-len(examples) // batch_size)) as advance:
        for rows, batch in packed_batches(examples, batch_size, placement.num_shards):
            sums, figures = step(placement.put(batch))
            total = sums if total is None else metrics.add(total, sums)
            if any(place < NUM_KEPT for row in rows for place in row):
                kept.append((rows, figures))
            advance("")
    assert total is not None
    return Assessed(total, kept, len(examples))


def conclude(assessed: Assessed) -> Evaluation:
    """Divides the sums, and puts the figures into the order of the examples."""
    total, kept, num_examples = assessed
    return Evaluation(metrics.summarize(total), _in_order(kept, num_examples))


def _in_order(
    kept: Sequence[tuple[Rows, metrics.Sums]], num_examples: int
) -> dict[str, list[float]]:
    """Figures of slots to those of examples; fetched now, when all are dispatched."""
    count = min(num_examples, NUM_KEPT)
    found = {name: [math.nan] * count for name in kept[0][1]}
    for rows, figures in kept:
        slots = [
            (row, slot, place)
            for row, places in enumerate(rows)
            for slot, place in enumerate(places)
            if place < count
        ]
        for name, array in figures.items():
            values = gathered(array)
            for row, slot, place in slots:
                found[name][place] = float(values[row, slot])
    return found


def make_sampler(
    loaded: Loaded,
    *,
    num_new: int,
    batch_size: int,
    placement: Placement,
    temperature: float = 1.0,
    truncation: Truncation = EVERY_TOKEN,
    num_samples: int = 1,
    settle: Settle | None = None,
) -> Sampler:
    """Builds a function that continues any number of prompts, compiled once a length.

    Args:
      loaded: the model and its tokenizer; the parameters are given at each call.
      num_new: most tokens of a completion.
      batch_size: prompts continued at one time, rounded up to fill the devices.
      placement: how rows reach the devices.
      temperature: divides the logits; 0 takes the most likely token.
      truncation: tokens that are too unlikely to be drawn.
      num_samples: completions of each prompt, which share its prefill.
      settle: says of completions whether they are whole; they keep a few tokens more
        than they need, and get an EOS. None: only EOS ends them.
    """
    generate = make_generate(
        loaded.model.extend,
        loaded.model.empty_cache,
        eos_token=loaded.eos_token,
        num_new=num_new,
        temperature=temperature,
        truncation=truncation,
        num_samples=num_samples,
    )

    num_rows = -(-batch_size // placement.num_shards) * placement.num_shards

    def sample(
        params: Params, prompts: Sequence[Sequence[int]], seed: int
    ) -> list[list[int]]:
        length = bucket_length(max(map(len, prompts)))
        completions: list[list[int]] = []
        with track("Sampling", total=-(-len(prompts) // num_rows)) as advance:
            for start in range(0, len(prompts), num_rows):
                some = prompts[start : start + num_rows]
                tokens, is_prompt = placement.put(pad_left(some, length, num_rows))
                key = jax.random.fold_in(jax.random.key(seed), start * num_samples)
                watch = _make_watch(settle, some, num_samples)
                found = generate(params, tokens, is_prompt, key, watch)
                rows = gathered(found)
                wanted = rows[: len(some) * num_samples]
                completions += [trim(row, loaded.eos_token) for row in wanted]
                advance("")
        return completions

    return sample


def _make_watch(
    settle: Settle | None,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
) -> Watch | None:
    """Asks of each row; those that only fill a batch are not needed."""
    if settle is None:
        return None
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]

    def watch(tokens: np.ndarray) -> np.ndarray:
        stopped = np.ones(len(tokens), bool)
        for row, prompt in enumerate(repeated):
            stopped[row] = settle(prompt, tokens[row].tolist()).is_whole
        return stopped

    return watch


def sample_metrics(
    completions: Sequence[Sequence[int]], eos_token: int
) -> dict[str, float]:
    """Length of samples in tokens, EOS included, and the share that ends by EOS.

    Args:
      completions: token ids, each up to its EOS.
      eos_token: the end-of-sequence token.

    Returns:
      ``samples/length`` and ``samples/eos_rate``, with standard errors as ``_se``.
    """
    length = jnp.array([len(row) for row in completions], jnp.float32)
    ended = jnp.array([row[-1] == eos_token for row in completions], jnp.float32)
    every = jnp.ones(len(completions), bool)
    return metrics.summarize(
        {
            "samples/length": metrics.moments(length, every),
            "samples/eos_rate": metrics.moments(ended, every),
        }
    )


def sampled_kl(
    loaded: Loaded,
    params: Params,
    reference: Params,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int,
    placement: Placement,
) -> dict[str, float]:
    """``kl``: KL(policy || reference) along the policy's own samples, nats a sequence.

    Args:
      loaded: the model.
      params: the policy that sampled the completions.
      reference: the reference.
      prompts: token ids of the prompts.
      completions: token ids sampled for each.
      batch_size: completions scored at one time.
      placement: how rows reach the devices.
    """
    examples = _with_completions(prompts, completions)
    step = make_kl_step(loaded.model.apply, spread=Spread(placement.mesh))
    return evaluate(
        step, params, reference, examples, batch_size=batch_size, placement=placement
    ).values


def make_sample_kl(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    num_new: int,
    placement: Placement,
) -> SampleKL:
    """Builds a function that measures `sampled_kl` again and again, compiled once.

    Args:
      loaded: the model.
      prompts: token ids, always the same.
      num_new: most tokens of a completion, which decides the shape.
      placement: how rows reach the devices.

    Returns:
      ``samples/kl`` and ``samples/kl_se`` of the completions of these prompts.
    """
    step = make_kl_step(loaded.model.apply, spread=Spread(placement.mesh))
    length = bucket_length(max(map(len, prompts)) + num_new)
    num_empty = round_up(len(prompts), placement.num_shards) - len(prompts)

    def sample_kl(
        params: Params, reference: Params, completions: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        rows = [[example] for example in _with_completions(prompts, completions)]
        batch = as_batch(rows + [[]] * num_empty, length=length, num_completions=1)
        sums, _ = step(params, reference, placement.put(batch))
        return metrics.summarize({"samples/kl": sums["kl"]})

    return sample_kl


def _with_completions(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[Example]:
    """An example of each prompt and its one completion."""
    return [
        Example(np.asarray(prompt, np.int32), (np.asarray(completion, np.int32),))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
