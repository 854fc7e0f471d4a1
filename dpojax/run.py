"""The loop: one run from its configuration to a model directory, chapter by chapter."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax

from dpojax.batch import Batch
from dpojax.config import TrainConfig
from dpojax.connecting import connect
from dpojax.course import Course
from dpojax.data.loader import fingerprint
from dpojax.evaluation import evaluate
from dpojax.fitting import check_memory, fit
from dpojax.held_out_samples import make_sample_writer
from dpojax.journal import Journal
from dpojax.material import load_material
from dpojax.model_card import facts
from dpojax.not_finite import Case, explain
from dpojax.policy import computed
from dpojax.preemption import preemption
from dpojax.prepare import check_training, make_configured_loss
from dpojax.processes import check_same
from dpojax.progress import make_first_times, say, track
from dpojax.reference_setting import why_not_equal
from dpojax.resume import abstract, find_step, make_note
from dpojax.run_directory import RunDirectory, open_directory, write_skipped
from dpojax.run_log import Plan, figures_line, num_parameters, summary
from dpojax.sharding import make_mesh, make_placement, put_ahead
from dpojax.spread import Spread
from dpojax.step_log import NotFinite
from dpojax.trackers import Trackers
from dpojax.train_step import make_eval_step
from dpojax.training import make_training


class Result(NamedTuple):
    """What a run leaves besides its directory."""

    directory: Path
    step: int
    num_steps: int  # of the whole run, where it may not have come yet
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


def run_to_end(config: TrainConfig) -> Result:
    """Trains a policy that something else is then made of.

    As `run`, but one that is told to end (SIGTERM) is not taken for a whole run.

    Raises:
      SystemExit: where it stopped before its last step.
    """
    result = run(config)
    if result.step < result.num_steps:
        raise SystemExit("Told to end: nothing is made of a run that is not whole.")
    return result


def _train(config: TrainConfig, place: RunDirectory, trackers: Trackers) -> Result:
    # -- Settings that cannot work ----------------------------------------------------
    loss = make_configured_loss(config.loss)
    mesh = make_mesh(**vars(config.mesh))
    check_training(config, loss)
    memory = check_memory(config, loss)
    directory = place.path

    # -- Model, data and reference ----------------------------------------------------
    loaded, policy, train, test, skipped, identity = load_material(config, loss, mesh)

    # -- Schedule, state and step -----------------------------------------------------
    placement = make_placement(mesh)
    course = Course(config, loss, train, placement.num_shards)
    num_steps = course.num_steps
    if memory is not None:
        config = fit(
            config,
            loss,
            loaded,
            policy,
            mesh,
            num_steps=num_steps,
            limit=memory,
            first_batch=lambda num_parts: next(course.batches(0, 1, num_parts))[1],
        )
        loaded = computed(loaded, config, mesh)
    training = make_training(config, loss, loaded, policy, mesh, num_steps)
    state = training.begin()

    # -- Resume: the state first, then what depends on its step -----------------------
    note = make_note(config, fingerprint(train), course.num_seen, identity)
    check_same(note, "start every process with the same settings and data")
    step = find_step(place.checkpoints) if config.resume else 0
    place.begin(config, loaded, step)  # only now: what was refused above leaves nothing
    if step == 0:
        write_skipped(directory, skipped)
    rates = training.learning_rates
    sampled = make_sample_writer(config, loss, loaded, test, placement)
    counts = {"training": len(train), "held out": len(test)}
    note |= {"facts": facts(config, loaded.base, num_examples=counts, rates=rates)}
    journal = Journal(place, config, course, rates, note, step, sampled, trackers)
    if step:
        like = jax.tree.map(abstract, state)
        jax.tree.map(lambda array: array.delete(), state)  # before there are two
        state = journal.restore(like)
    if config.resume:
        say(f"Resuming {directory} at step {step}.")

    # -- Evaluation -------------------------------------------------------------------
    eval_step = make_eval_step(
        loaded.model.apply,
        loss,
        token_metrics=config.token_metrics,
        chunk_size=config.chunk_size,
        spread=Spread(mesh),
    )

    def evaluated(step: int) -> dict[str, float]:
        params = policy.whole(state.params)
        reference = state.moving.get("reference", policy.reference)
        found = evaluate(
            partial(eval_step, running=state.running),
            params,
            reference,
            test,
            batch_size=config.batch_size,
            placement=placement,
        )
        return journal.evaluated(step, found, params, reference)

    # -- Before the first step --------------------------------------------------------
    counts = (num_parameters(state.params), num_parameters(loaded.params))
    at = min(step, num_steps - 1)
    num_tokens, batch = next(course.batches(at, at + 1, config.microbatches))
    plan = Plan(
        loss=loss,
        state=state,
        others=(policy.reference, training.frozen),
        num_trained=counts[0],
        num_parameters=counts[1],
        num_train=len(train),
        num_test=len(test),
        num_steps=num_steps,
        learning_rate=float(rates.max()),
        mesh=mesh.shape,
        shape=batch.tokens.shape,
        num_tokens=num_tokens,
    )
    say(summary(config, plan))
    first: dict[str, float] = {}
    if step == 0:
        first = evaluated(0)
        reason = why_not_equal(config, first)
        if reason is not None:
            say(reason)

    # -- The loop ---------------------------------------------------------------------
    @contextmanager
    def explaining() -> Iterator[None]:
        try:
            yield
        except NotFinite as error:
            at, parts = error.step - 1, config.microbatches
            batch = next(course.batches(at, at + 1, parts))[1]
            rows = course.locate(at, parts)
            case = Case(batch, rows, train, loaded.tokenizer, config, directory)
            raise explain(error, case, state, training, placement) from None

    steps = journal.start_steps()
    batches = course.batches(step, course.stop, config.microbatches, placement.own_rows)

    def put_own(counted: tuple[int, Batch]) -> Batch:
        return placement.put_own(counted[1])

    bar = track("Training", total=num_steps, done=step, lines=False)
    compiling = make_first_times()
    with (
        preemption() as is_preempted,  # to the end: a checkpoint may be on its way
        closing(journal),
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
            due = course.due(step, stop=step if preempted else course.stop)
            if due.log or due.evaluate:
                steps.end_interval()
            if due.evaluate or due.save:
                journal.settle()
                with steps.paused():
                    if due.evaluate:
                        evaluated(step)
                    if due.save:
                        journal.save(step, state)
            advance(figures_line("", steps.latest))
            if preempted:
                break

    # -- What remains -----------------------------------------------------------------
    if step == num_steps:
        journal.write_model(state.params, loaded)
    else:
        say(f"Stopped after step {step} of {num_steps}; continue with --resume.")
    return Result(directory, step, num_steps, first, journal.last, steps.median_speed)
