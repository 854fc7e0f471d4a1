"""The loop: one run from its configuration to a model directory, chapter by chapter."""

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dpojax.advice import Adviser
from dpojax.batch import Batch
from dpojax.checkpoint import Checkpoints
from dpojax.config import TrainConfig
from dpojax.connecting import connect
from dpojax.data.bad_records import Skipped
from dpojax.data.loader import counted_batches, fingerprint, locate
from dpojax.data.packing import OwnRows, every_row, with_mismatched
from dpojax.evaluation import evaluate
from dpojax.examples import balance_advice, load_split
from dpojax.fitting import check_memory, fit
from dpojax.held_out_samples import make_sample_writer
from dpojax.loading import as_reward_examples, check_positions
from dpojax.memory_peaks import peak_memory
from dpojax.metrics_file import MetricsFile
from dpojax.model_card import facts, make_card, with_card
from dpojax.not_finite import Case, explain
from dpojax.policy import computed, load_policy, make_policy, write_trained
from dpojax.precompute import precompute
from dpojax.preemption import preemption
from dpojax.prepare import check_training, is_logistic, make_configured_loss
from dpojax.processes import check_same
from dpojax.progress import make_first_times, say, track
from dpojax.recording import Recording
from dpojax.reference_setting import named_reference, why_not_equal
from dpojax.resume import abstract, check_note, find_step, make_note
from dpojax.run_directory import RunDirectory, open_directory, write_skipped
from dpojax.run_log import Plan, figures_line, num_parameters, summary, time_line
from dpojax.sharding import (
    make_mesh,
    make_placement,
    put_ahead,
)
from dpojax.spread import Spread
from dpojax.step_log import Figures, NotFinite, StepLog
from dpojax.trackers import Trackers
from dpojax.train_step import make_eval_step
from dpojax.training import make_training


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
      FloatingPointError: naming the step whose loss or gradient was not finite, where
        in it that began and in which examples.
    """
    connect(config.distributed)
    with open_directory(config) as place, Trackers(config.track) as trackers:
        return _train(config, place, trackers)


def _train(config: TrainConfig, place: RunDirectory, trackers: Trackers) -> Result:
    # -- Settings that cannot work ----------------------------------------------------
    loss = make_configured_loss(config.loss)
    mesh = make_mesh(**vars(config.mesh))
    check_training(config, loss)
    memory = check_memory(config, loss)
    directory = place.path

    # -- Model, data and reference ----------------------------------------------------
    loaded = load_policy(config, loss, mesh)
    check_positions(loaded, config.max_length)
    skipped: list[Skipped] = []
    train = load_split(config, loss, loaded.tokenizer, config.train_split, skipped)
    test = load_split(config, loss, loaded.tokenizer, config.test_split, skipped)
    if "reward_head" in loss.needs:
        train, test = (as_reward_examples(part, loaded) for part in (train, test))
    advice = balance_advice(loss, train)
    if advice is not None:
        say(advice)
    mismatch_within = config.max_length if "mismatched" in loss.needs else None
    if mismatch_within is not None:
        test = with_mismatched(test, mismatch_within)
    policy = make_policy(config, loss, loaded, mesh)
    identity = None  # of the precomputed reference
    if named_reference(config.reference).is_precomputed:
        (train, test), cache = precompute(config, loaded, mesh, (train, test))
        identity = cache.identity

    # -- Schedule, state and step -----------------------------------------------------
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

    placement = make_placement(mesh)

    def order(num_microbatches: int) -> dict[str, Any]:
        return {
            "batch_size": config.batch_size,
            "num_seen": num_seen,
            "seed": config.seed,
            "row_multiple": num_microbatches * placement.num_shards,
            "row_length": config.row_length,
            "mismatch_within": mismatch_within,
        }

    def batches_of(
        start: int, stop: int, num_microbatches: int, own_rows: OwnRows = every_row
    ) -> Iterator[tuple[int, Batch]]:
        span = {"start": start, "stop": stop, "own_rows": own_rows}
        return counted_batches(train, **order(num_microbatches), **span)

    if memory is not None:
        config = fit(
            config,
            loss,
            loaded,
            policy,
            mesh,
            num_steps=num_steps,
            limit=memory,
            first_batch=lambda num_parts: next(batches_of(0, 1, num_parts))[1],
        )
        loaded = computed(loaded, config, mesh)
    training = make_training(config, loss, loaded, policy, mesh, num_steps)
    state = training.begin()

    # -- Resume: the state first, then what depends on its step -----------------------
    note = make_note(config, fingerprint(train), num_seen, identity)
    check_same(note, "start every process with the same settings and data")
    step = find_step(directory / "checkpoints") if config.resume else 0
    if step == 0:  # only now: what was refused above leaves no directory behind
        place.begin(config, loaded)
        write_skipped(directory, skipped)
    checkpoints = Checkpoints(directory / "checkpoints", keep_last=config.keep_last)
    about = facts(
        config,
        loaded.base,
        num_examples={"training": len(train), "held out": len(test)},
        rate=float(training.learning_rates.max()),
    )
    first: dict[str, float] = {}
    last, last_at = first, -1  # the newest evaluation and its step
    unlogged: Figures = []
    if step:
        saved = checkpoints.note(step)
        check_note(saved, note, directory)
        like = jax.tree.map(abstract, state)
        jax.tree.map(lambda array: array.delete(), state)  # before there are two
        state = checkpoints.restore(step, like)
        last, last_at = saved["evaluation"], saved["evaluated_at"]
        unlogged = saved["unlogged"]
    if config.resume:
        say(f"Resuming {directory} at step {step}.")
    adviser = Adviser(
        batch_size=config.batch_size, is_logistic=is_logistic(config.loss)
    )
    log = Recording(directory, step or -1, adviser, trackers, note["configuration"])
    each = MetricsFile(directory / "held_out.jsonl", keep_until=step or -1)

    def noted() -> dict[str, Any]:
        newest = {"evaluation": last, "evaluated_at": last_at, "facts": about}
        return note | newest

    # -- Evaluation -------------------------------------------------------------------
    eval_step = make_eval_step(
        loaded.model.apply,
        loss,
        token_metrics=config.token_metrics,
        chunk_size=config.chunk_size,
        spread=Spread(mesh),
    )

    sampled = make_sample_writer(config, loss, loaded, test, placement, directory)

    def evaluated(step: int) -> dict[str, float]:
        params = policy.whole(state.params)
        reference = state.moving.get("reference", policy.reference)
        values, figures = evaluate(
            partial(eval_step, running=state.running),
            params,
            reference,
            test,
            batch_size=config.batch_size,
            placement=placement,
        )
        values |= sampled(params, reference, step)
        log.write(step, "test", values)
        each.write_each(step, figures)
        say(figures_line(f"test  step {step}", values))
        return values

    # -- Before the first step --------------------------------------------------------
    counts = (num_parameters(state.params), num_parameters(loaded.params))
    at = min(step, num_steps - 1)
    num_tokens, batch = next(batches_of(at, at + 1, config.microbatches))
    plan = Plan(
        loss=loss,
        state=state,
        others=(policy.reference, training.frozen),
        num_trained=counts[0],
        num_parameters=counts[1],
        num_train=len(train),
        num_test=len(test),
        num_steps=num_steps,
        learning_rate=float(training.learning_rates.max()),
        mesh=mesh.shape,
        shape=batch.tokens.shape,
        num_tokens=num_tokens,
    )
    say(summary(config, plan))
    if step == 0:
        first = evaluated(0)
        last, last_at = first, 0
        reason = why_not_equal(config, first)
        if reason is not None:
            say(reason)

    # -- The loop ---------------------------------------------------------------------
    def logged(step: int, values: dict[str, float]) -> None:
        values["learning_rate"] = float(training.learning_rates[step - 1])
        values["memory_gib"] = peak_memory() or math.nan
        values["epoch"] = min(step * config.batch_size, num_seen) / len(train)
        log.write(step, "train", values)
        if step == num_steps or step % config.log_every == 0:
            left = time_line(steps.seconds_left(num_steps - step))
            say(figures_line(f"train step {step}", values) + left)

    @contextmanager
    def explaining() -> Iterator[None]:
        try:
            yield
        except NotFinite as error:
            at, parts = error.step - 1, config.microbatches
            batch = next(batches_of(at, at + 1, parts))[1]
            rows = locate(train, at, **order(parts))
            case = Case(batch, rows, train, loaded.tokenizer, config, directory)
            raise explain(error, case, state, training, placement) from None

    steps = StepLog(logged, unlogged, on_nan=config.on_nan)
    batches = batches_of(step, stop, config.microbatches, placement.own_rows)

    def put_own(counted: tuple[int, Batch]) -> Batch:
        return placement.put_own(counted[1])

    bar = track("Training", total=num_steps, done=step, lines=False)
    compiling = make_first_times()
    with (
        preemption() as is_preempted,  # to the end: a checkpoint may be on its way
        closing(checkpoints),
        bar as advance,
        explaining(),
    ):
        for (num_tokens, _), placed in put_ahead(batches, put_own):
            rows, positions = placed.tokens.shape
            with compiling(f"Compiling a step of {rows:,} x {positions:,} positions"):
                state, sums = training.step(state, training.frozen, placed)
            steps.catch_up()  # with an interval that ended before this step
            step += 1
            steps.add(step, sums, num_tokens)
            preempted = is_preempted(step)
            # Whether a run is stopped changes neither its lines nor its evaluations.
            due = {
                name: step == num_steps or step % every == 0
                for name, every in (
                    ("log", config.log_every),
                    ("evaluate", config.evaluate_every),
                    ("save", config.save_every),
                )
            }
            due["save"] |= step == stop or preempted
            if due["log"] or due["evaluate"]:
                steps.end_interval()
            if due["evaluate"] or due["save"]:
                steps.catch_up()  # what is no number is found before it is saved
                unlogged = steps.unlogged()
                with steps.paused():
                    if due["evaluate"]:
                        last, last_at = evaluated(step), step
                    if due["save"]:
                        log.keep()
                        each.keep()
                        saved = noted() | {"unlogged": unlogged}
                        best_by = last["loss"] if last_at == step else None
                        checkpoints.save(step, state, saved, best_by)
            advance(figures_line("", steps.latest))
            if preempted:
                break

    # -- What remains -----------------------------------------------------------------
    if step == num_steps:
        card = make_card(
            noted(),
            step,
            is_adapter=loaded.model.lora is not None,
            is_reward="reward_head" in loss.needs,
        )
        write_trained(
            directory / "final",
            state.params,
            loaded.model,
            loaded.settings,
            loaded.base,
            with_card(loaded.tokenizer.save_pretrained, card),
            generation_settings=loaded.generation_settings,
        )
        say(f"The model is in {directory / 'final'}.")
    else:
        say(f"Stopped after step {step} of {num_steps}; continue with --resume.")
    return Result(directory, step, first, last, steps.median_speed)
