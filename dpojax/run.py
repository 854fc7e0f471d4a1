"""The loop: one run from its configuration to a model directory, chapter by chapter."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dpojax import metrics
from dpojax.checkpoint import Checkpoints
from dpojax.config import TrainConfig
from dpojax.data.loader import fingerprint, training_batches
from dpojax.data.packing import Example, with_mismatched
from dpojax.data.tokenize import Tokenizer
from dpojax.evaluation import evaluate, make_sampler, sample_metrics
from dpojax.loading import Loaded, as_reward_examples, check_positions
from dpojax.losses.make import Loss
from dpojax.models.families import aux_loss_coefficient
from dpojax.optimizer import make_optimizer
from dpojax.policy import (
    Policy,
    default_learning_rate,
    load_policy,
    make_policy,
    write_trained,
)
from dpojax.prepare import (
    balance_advice,
    check_training,
    configured_schedule,
    load_examples,
    make_configured_loss,
    make_movement,
)
from dpojax.progress import say, track
from dpojax.reference import Movement, Params
from dpojax.resume import abstract, check_note, make_note
from dpojax.run_directory import choose_directory, write_frame, write_samples
from dpojax.run_log import drain, figures_line, num_parameters, summary
from dpojax.sharding import (
    Placement,
    as_shardings,
    make_mesh,
    make_placement,
    num_row_shards,
    rows_sharding,
)
from dpojax.train_step import TrainState, make_eval_step, make_train_step


class Result(NamedTuple):
    """What a run leaves besides its directory."""

    directory: Path
    step: int
    first_evaluation: dict[str, float]  # empty for a resumed run
    last_evaluation: dict[str, float]
    tokens_per_second: float  # median over the log's intervals; padding not counted


def run(config: TrainConfig) -> Result:
    """Trains a policy.

    Args:
      config: what to do; `model` and `data` are given.

    Returns:
      Where the run is and what it measured.

    Raises:
      ValueError: for settings that cannot work, before anything is loaded; for models
        and data that cannot be read, before anything is compiled.
      FloatingPointError: naming the step whose loss or gradient was not finite.
    """
    # -- Settings that cannot work ----------------------------------------------------
    loss = make_configured_loss(config.loss)
    movement = make_movement(config.moving, loss)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_training(config, loss)
    directory = choose_directory(config)

    # -- Model, data and reference ----------------------------------------------------
    loaded = load_policy(config, loss, mesh)
    check_positions(loaded, config.max_length)
    train = _read_examples(config, loss, loaded.tokenizer, config.train_split)
    test = _read_examples(config, loss, loaded.tokenizer, config.test_split)
    if "reward_head" in loss.needs:
        train, test = (as_reward_examples(part, loaded) for part in (train, test))
    advice = balance_advice(loss, train)
    if advice is not None:
        say(advice)
    mismatch_within = config.max_length if "mismatched" in loss.needs else None
    if mismatch_within is not None:
        test = with_mismatched(test, mismatch_within)
    policy = make_policy(config, loss, loaded, mesh)

    # -- Schedule, optimiser and state ------------------------------------------------
    epochs = 1 if config.epochs is None else config.epochs
    num_seen = max(1, round(len(train) * epochs))
    if config.steps is not None:
        num_seen = config.steps * config.batch_size
    if mismatch_within is not None and num_seen % config.batch_size == 1:
        num_seen -= 1  # a last batch of one example has no other completion in it
    num_steps = math.ceil(num_seen / config.batch_size)
    stop = num_steps if config.stop_after is None else config.stop_after
    if stop > num_steps:
        raise ValueError(f"stop_after is {stop}, but the run has {num_steps} steps.")
    schedule = configured_schedule(
        config.optimizer, default_learning_rate(loss, loaded), num_steps
    )
    optimizer = make_optimizer(
        config.optimizer.name,
        schedule,
        max_grad_norm=config.optimizer.max_grad_norm,
        weight_decay=config.optimizer.weight_decay,
        beta1=config.optimizer.beta1,
        beta2=config.optimizer.beta2,
        epsilon=config.optimizer.epsilon,
    )
    state = _init_state(policy, optimizer, loss, movement, mesh)
    shardings = jax.tree.map(lambda array: array.sharding, state)
    # A reference that moves is in the state.
    frozen = None if movement is not None else policy.frozen

    # -- Resume: the state first, then what depends on its step -----------------------
    checkpoints = Checkpoints(directory / "checkpoints", keep_last=config.keep_last)
    note = make_note(config, fingerprint(train), num_seen)
    step = checkpoints.steps[-1] if config.resume and checkpoints.steps else 0
    if step == 0:  # only now: what was refused above leaves no directory behind
        write_frame(directory, config, loaded)
    first: dict[str, float] = {}
    last, last_at = first, -1  # the newest evaluation and its step
    if step:
        saved = checkpoints.note(step)
        check_note(saved, note, directory)
        state = checkpoints.restore(step, jax.tree.map(abstract, state))
        last, last_at = saved["evaluation"], saved["evaluated_at"]
    if config.resume:
        say(f"Resuming {directory} at step {step}.")
    log = metrics.MetricsFile(directory / "metrics.jsonl", keep_until=step or -1)

    # -- The compiled functions -------------------------------------------------------
    train_step = make_train_step(
        loaded.model.apply,
        loss,
        optimizer,
        num_microbatches=config.microbatches,
        chunk_size=config.chunk_size,
        num_shards=num_row_shards(mesh),
        movement=movement,
        roles=policy.roles,
        aux_loss_coefficient=aux_loss_coefficient(loaded.settings),
        state_shardings=shardings,
        rows_sharding=rows_sharding(mesh),
    )
    eval_step = make_eval_step(
        loaded.model.apply,
        loss,
        chunk_size=config.chunk_size,
        num_shards=num_row_shards(mesh),
    )

    placement = make_placement(mesh)
    sampled = _make_sample_writer(config, loss, loaded, test, placement, directory)

    def evaluated(step: int) -> dict[str, float]:
        params = policy.whole(state.params)
        values = evaluate(
            partial(eval_step, running=state.running),
            params,
            state.moving.get("reference", policy.reference),
            test,
            batch_size=config.batch_size,
            placement=placement,
        )
        values |= sampled(params, step)
        log.write(step, "test", values)
        say(figures_line(f"test  step {step}", values))
        return values

    # -- Before the first step --------------------------------------------------------
    counts = (num_parameters(state.params), num_parameters(loaded.params))
    say(summary(config, counts, len(train), len(test), num_steps, mesh.shape))
    if step == 0:
        first = evaluated(0)
        last, last_at = first, 0

    # -- The loop ---------------------------------------------------------------------
    pending: list[tuple[int, metrics.Sums]] = []
    speeds, tokens, since = [], 0, time.perf_counter()
    batches = training_batches(
        train,
        batch_size=config.batch_size,
        num_seen=num_seen,
        seed=config.seed,
        start=step,
        stop=stop,
        row_multiple=config.microbatches * num_row_shards(mesh),
        row_length=config.row_length,
        mismatch_within=mismatch_within,
    )
    figures = ""
    bar = track("Training", total=num_steps, done=step)
    with closing(checkpoints), bar as advance:
        for batch in batches:
            state, sums = train_step(state, frozen, placement.put(batch))
            step += 1
            pending.append((step, sums))
            tokens += int(np.count_nonzero(batch.example))
            is_last = step == stop
            due = {
                name: is_last or step % every == 0
                for name, every in (
                    ("log", config.log_every),
                    ("evaluate", config.evaluate_every),
                    ("save", config.save_every),
                )
            }
            if any(due.values()):
                values = drain(pending)
                speeds.append(tokens / (time.perf_counter() - since))
                values |= {
                    "learning_rate": float(np.asarray(schedule(step - 1))),
                    "epoch": min(step * config.batch_size, num_seen) / len(train),
                    "tokens_per_second": speeds[-1],
                }
                log.write(step, "train", values)
                figures = figures_line("", values)
                if due["log"]:
                    say(figures_line(f"train step {step}", values))
            if due["evaluate"]:
                last, last_at = evaluated(step), step
            if due["save"]:
                newest = {"evaluation": last, "evaluated_at": last_at}
                best_by = last["loss"] if last_at == step else None
                checkpoints.save(step, state, note | newest, best_by)
            if any(due.values()):
                tokens, since = 0, time.perf_counter()
            advance(figures)

    # -- What remains -----------------------------------------------------------------
    if step == num_steps:
        write_trained(
            directory / "final",
            state.params,
            loaded.model,
            loaded.settings,
            loaded.base,
            loaded.tokenizer.save_pretrained,
            generation_settings=loaded.generation_settings,
        )
        say(f"The model is in {directory / 'final'}.")
    else:
        say(f"Stopped after step {step} of {num_steps}; continue with --resume.")
    return Result(directory, step, first, last, float(np.median(speeds or [np.nan])))


def _init_state(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    movement: Movement | None,
    mesh: Mesh,
) -> TrainState:
    """The state before the first step; the policy's own arrays are part of it."""
    params = policy.trained
    opt_shapes = jax.eval_shape(optimizer.init, params)
    init = jax.jit(optimizer.init, out_shardings=as_shardings(opt_shapes, mesh))
    moving = {} if movement is None else movement.init(params, policy.reference)
    step = jnp.zeros((), jnp.int32)
    state = TrainState(step, params, init(params), loss.initial_running(), moving)
    return jax.device_put(state, as_shardings(state, mesh))


def _make_sample_writer(
    config: TrainConfig,
    loss: Loss,
    loaded: Loaded,
    test: Sequence[Example],
    placement: Placement,
    directory: Path,
) -> Callable[[Params, int], dict[str, float]]:
    """A function that continues the same held-out prompts, writes them and measures."""
    prompts = [example.prompt.tolist() for example in test[: config.sample_prompts]]
    if not prompts or "reward_head" in loss.needs:
        return lambda params, step: {}
    sampler = make_sampler(
        loaded,
        num_new=config.sample_tokens,
        batch_size=len(prompts),
        placement=placement,
    )

    def sampled(params: Params, step: int) -> dict[str, float]:
        completions = sampler(params, prompts, config.seed)
        write_samples(directory, step, prompts, completions, loaded.tokenizer)
        return sample_metrics(completions, loaded.eos_token)

    return sampled


def _read_examples(
    config: TrainConfig, loss: Loss, tokenizer: Tokenizer, split: str
) -> list[Example]:
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
    )
