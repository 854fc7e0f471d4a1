"""The embedded default: the DPO paper's controlled-sentiment task in miniature.

A small decoder learns to write reviews (SFT), continues openings, an exact reward says
which of its completions is the more positive, and DPO aligns it. Both runs are ordinary
ones, on files that this leaves in the run directory. This file knows no numerics.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.config import LossConfig, OptimizerConfig, TrainConfig
from dpojax.data.labels import label_pairs, rank_completions
from dpojax.data.synthetic import (
    REWARD_RANGE,
    make_openings,
    make_reviews,
    make_tokenizer,
    reward,
)
from dpojax.data.tokenize import encode_prompt
from dpojax.evaluation import make_sampler, sampled_kl
from dpojax.loading import Loaded, load_model, new_directory
from dpojax.losses.make import Loss
from dpojax.models.decoder import DecoderConfig, make_model
from dpojax.models.families import as_settings
from dpojax.models.huggingface import write_model
from dpojax.placing import Keeping
from dpojax.prepare import make_configured_loss
from dpojax.progress import say, show_completions, show_table
from dpojax.run import Result, run_to_end
from dpojax.run_directory import default_name
from dpojax.sharding import make_mesh, make_placement
from dpojax.whole_files import write_json_lines

NUM_REVIEWS = 6_000
NUM_OPENINGS = 1_500  # continued to make the pairs
COMPLETIONS_PER_OPENING = 8
NUM_HELD_OUT = 256
MAX_LENGTH = 48  # tokens of a review; the few longer ones are left out
BATCH_SIZE = 16  # small batches stay in a CPU's cache, and more steps learn more
SAMPLE_BATCH = 256
SETTINGS = ("output", "seed", "mesh", "loss", "moving", "optimizer", "track")


class Task(NamedTuple):
    """A model to align, and what to align it with."""

    directory: Path
    model: str  # the SFT model that wrote the completions: policy and reference
    pairs: str  # data: the best and the worst completion of each opening, with scores
    rankings: str  # data: all completions of each opening, with scores
    held_out: list[str]  # openings that none of the data has


class Samples(NamedTuple):
    """Completions of the held-out openings by one policy, and what they are worth."""

    texts: list[str]
    rewards: np.ndarray
    kl: dict[str, float]


def run_sentiment(config: TrainConfig) -> tuple[Result, Samples, Samples]:
    """Runs the whole task and prints its table.

    Args:
      config: the defaults, but for `SETTINGS`.

    Returns:
      The aligning run's result, and the samples before and after it.

    Raises:
      ValueError: if another setting is given, since it would need a model and data.
    """
    start = time.perf_counter()
    loss = make_configured_loss(config.loss)
    if "reward_head" in loss.needs:
        raise ValueError(
            f"The loss {loss.name!r} trains a reward model, which writes nothing; give "
            "--model and --data, or align the embedded task with another loss."
        )
    if loss.kind == "single" and loss.name != "sft":
        raise ValueError(
            f"The loss {loss.name!r} forgets what it is given, and the embedded task "
            "has only what is to be learned; give --model and --data."
        )
    plain = TrainConfig()
    if replace(plain, **{name: vars(config)[name] for name in SETTINGS}) != config:
        raise ValueError(
            "Training needs --model and --data; without them, for the embedded task, "
            f"only these can be set: {', '.join(SETTINGS)}."
        )
    directory = new_directory(config.output or default_name("sentiment"))
    task = make_task(directory, config)

    say(f"3/4  Aligning it with {loss.name}")
    result = run_to_end(alignment_config(task, config, loss))

    say(f"4/4  Sampling {NUM_HELD_OUT} held-out openings before and after")
    reference, policy = (
        load_model(model, Keeping(make_mesh()))
        for model in (task.model, str(result.directory / "final"))
    )
    before = sample(reference, reference, task.held_out, config.seed)
    after = sample(policy, reference, task.held_out, config.seed)
    texts = {"before": before.texts, "after": after.texts}
    show_completions(task.held_out[:5], texts)
    _show(loss, result, before, after, time.perf_counter() - start)
    return result, before, after


def make_task(directory: Path, config: TrainConfig) -> Task:
    """Trains the SFT model, samples it and labels what it wrote.

    Args:
      directory: where all of it goes.
      config: its seed and mesh are used.
    """
    seed = config.seed
    say(f"1/4  Pre-training a small decoder on {NUM_REVIEWS:,} synthetic reviews")
    reviews = make_reviews(NUM_REVIEWS, seed=seed)
    rows = ({"prompt": "", "completion": review} for review in reviews)
    _write_lines(directory / "reviews.jsonl", rows)
    _write_small_model(directory / "model", seed)
    sft = run_to_end(_sft_config(config, directory))

    say(f"2/4  Sampling and labelling {COMPLETIONS_PER_OPENING} x {NUM_OPENINGS:,}")
    model = str(sft.directory / "final")
    loaded = load_model(model, Keeping(make_mesh()))
    # Without repetition, so that no held-out pair has an opening that was trained on.
    openings = list(dict.fromkeys(make_openings(NUM_OPENINGS, seed=seed + 1)))
    repeated = [text for text in openings for _ in range(COMPLETIONS_PER_OPENING)]
    sampled = iter(_continue(loaded, repeated, seed))
    groups = [[next(sampled) for _ in range(COMPLETIONS_PER_OPENING)] for _ in openings]
    # A sampler may end at once; what says nothing is no completion.
    written = [[text for text in group if text.strip()] for group in groups]
    fresh = dict.fromkeys(make_openings(2 * NUM_HELD_OUT, seed=seed + 2))
    trained_on = set(openings)
    return Task(
        directory,
        model,
        _write_lines(directory / "pairs.jsonl", label_pairs(openings, written)),
        _write_lines(directory / "rankings.jsonl", rank_completions(openings, written)),
        [text for text in fresh if text not in trained_on][:NUM_HELD_OUT],
    )


def alignment_config(task: Task, config: TrainConfig, loss: Loss) -> TrainConfig:
    """The run that aligns the task's model: three epochs, unless told otherwise."""
    optimizer = config.optimizer
    if optimizer == OptimizerConfig():
        optimizer = OptimizerConfig(learning_rate=7e-4, beta2=0.99)
    return replace(
        _both(config),
        loss=config.loss,
        moving=config.moving,
        model=task.model,
        data=(task.rankings if loss.kind == "ranked" else task.pairs,),
        output=str(task.directory / "aligned"),
        epochs=3,
        optimizer=optimizer,
    )


def sample(
    policy: Loaded, reference: Loaded, openings: list[str], seed: int
) -> Samples:
    """Continues openings by a policy: the texts, their reward and their KL.

    Args:
      policy: the model that writes.
      reference: the model that its KL is taken to.
      openings: what is continued.
      seed: decides the samples.
    """
    completions, prompts = _continue_tokens(policy, openings, seed)
    kl = sampled_kl(
        policy,
        policy.params,
        reference.params,
        prompts,
        completions,
        batch_size=SAMPLE_BATCH,
        placement=make_placement(make_mesh()),
    )
    texts = _decode(policy, completions)
    whole = (opening + text for opening, text in zip(openings, texts, strict=True))
    return Samples(texts, np.array([reward(text) for text in whole]), kl)


def _both(config: TrainConfig) -> TrainConfig:
    """What the two runs share."""
    return replace(
        TrainConfig(),
        seed=config.seed,
        mesh=config.mesh,
        track=config.track,
        test_size=256,
        max_length=MAX_LENGTH,
        batch_size=BATCH_SIZE,
        sample_prompts=0,
        log_every=50,
        evaluate_every=1_000,
        save_every=1_000,
    )


def _sft_config(config: TrainConfig, directory: Path) -> TrainConfig:
    return replace(
        _both(config),
        loss=LossConfig(name="sft"),
        model=str(directory / "model"),
        data=(str(directory / "reviews.jsonl"),),
        output=str(directory / "sft"),
        too_long="drop",
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", beta2=0.98),
    )


def _write_small_model(directory: Path, seed: int) -> None:
    tokenizer = make_tokenizer()
    shape = DecoderConfig(
        vocabulary_size=-(-len(tokenizer) // 128) * 128,
        width=128,
        num_layers=2,
        num_heads=4,
        num_key_heads=4,
        head_dimension=32,
        mlp_width=384,
        tied_output=True,
        max_length=256,
    )
    params = jax.jit(make_model(shape).init)(jax.random.key(seed))
    write_model(directory, params, as_settings(shape), tokenizer.save_pretrained)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    write_json_lines(path, rows)
    return str(path)


def _continue(loaded: Loaded, openings: list[str], seed: int) -> list[str]:
    tokens, _ = _continue_tokens(loaded, openings, seed)
    return _decode(loaded, tokens)


def _continue_tokens(
    loaded: Loaded, openings: list[str], seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Sampled token ids, and those of the openings."""
    sampler = make_sampler(
        loaded,
        num_new=MAX_LENGTH - 8,
        batch_size=SAMPLE_BATCH,
        placement=make_placement(make_mesh()),
    )
    prompts = [encode_prompt(text, loaded.tokenizer) for text in openings]
    return sampler(loaded.params, prompts, seed), prompts


def _decode(loaded: Loaded, rows: list[list[int]]) -> list[str]:
    decode = loaded.tokenizer.decode
    return [str(decode(row, skip_special_tokens=True)) for row in rows]


def _show(
    loss: Loss, result: Result, before: Samples, after: Samples, seconds: float
) -> None:
    first, last = result.first_evaluation, result.last_evaluation

    def row(label: str, name: str) -> list[tuple[str, str, str]]:
        if name not in first:  # not every loss has rewards, or a reference
            return []
        return [(label, _figure(first, name), _figure(last, name))]

    def mean_reward(samples: Samples) -> str:
        values = samples.rewards
        return f"{values.mean():.3f} ± {values.std() / np.sqrt(len(values) - 1):.3f}"

    low, high = REWARD_RANGE
    rise = (after.rewards.mean() - before.rewards.mean()) / (high - low)
    kl = (_figure(samples.kl, "kl") for samples in (before, after))
    show_table(
        f"{loss.name} on controlled sentiment, held-out openings",
        ("", "before", "after"),
        [
            *row("reward accuracy on held-out pairs", "rewards/accuracies"),
            ("ground-truth reward", mean_reward(before), mean_reward(after)),
            ("KL(policy‖reference), nats", *kl),
            *row("chosen log-ratio, nats", "logratios/chosen"),
            *row("rejected log-ratio, nats", "logratios/rejected"),
            ("training tokens/s", "", f"{result.tokens_per_second:,.0f}"),
        ],
    )
    say(
        f"The reward of {len(after.rewards)} samples rose by {100 * rise:.0f} % of its "
        f"range [{low:g}, {high:g}] in {seconds:.0f} s, all included."
    )


def _figure(values: dict[str, float], name: str) -> str:
    return f"{values[name]:.3f} ± {values[name + '_se']:.3f}"
