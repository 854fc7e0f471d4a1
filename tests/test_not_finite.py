"""A step that is not finite: what it leaves alone, where it began, what is saved."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_run import metrics_of
from tiny_models import SMALL

from dpojax.batch import Batch
from dpojax.config import LossConfig, TrainConfig
from dpojax.data.loader import counted_batches, locate
from dpojax.data.packing import Example, as_batch
from dpojax.examination import Findings, make_examine
from dpojax.examples import load_split
from dpojax.losses.make import make_loss
from dpojax.measure import make_measure
from dpojax.metrics import Ratio
from dpojax.models.decoder import Model, make_model
from dpojax.not_finite import find_row
from dpojax.optimizer import make_optimizer, make_schedule
from dpojax.origin import find_origin
from dpojax.policy import load_policy
from dpojax.prepare import make_configured_loss
from dpojax.reference import copy_params
from dpojax.run import run
from dpojax.sharding import make_mesh
from dpojax.step_log import MOST_SKIPPED, Figures, NotFinite, StepLog
from dpojax.train_step import TrainState, all_weights, init_state, make_train_step


def random_examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(1, 120, rng.integers(low, high)).astype(np.int32)

    return [Example(tokens(2, 6), (tokens(3, 9), tokens(3, 9))) for _ in range(count)]


# -- The step -------------------------------------------------------------------------


def embeddings(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """A model of two tables."""
    return params["in"][batch.tokens], params["out"]


def take(on_nan: Any, objective: str = "beta_dpo") -> list[Any]:
    """States before and after three steps, the batch of the second of which is bad."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        name: jax.random.normal(key, (128, 8))
        for name, key in zip(("in", "out"), keys, strict=True)
    }
    reference = copy_params(params)
    schedule = make_schedule("linear", learning_rate=1e-2, num_steps=10, warmup_steps=0)
    optimizer, loss = make_optimizer("adamw", schedule), make_loss(objective)
    step = make_train_step(embeddings, loss, optimizer, on_nan=on_nan)
    state = init_state(params, optimizer, loss)
    states = [jax.device_get(state)]
    for number in range(3):
        batch = as_batch([[one] for one in random_examples(4, number)], length=24)
        if number == 1:
            batch.weight[2] = np.inf
        state, _ = step(state, reference, batch)
        states.append(jax.device_get(state))
    return states


def same(first: Any, second: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


def test_a_skipped_update_changes_nothing_but_the_step_and_the_schedule():
    _, before, after, last = take("skip")
    for name in ("params", "running", "halted"):
        assert same(getattr(before, name), getattr(after, name)), name
    adam, _, schedule = before.opt_state[1]
    held, _, moved = after.opt_state[1]
    assert same(adam, held) and adam.count == 1
    assert (schedule.count, moved.count) == (1, 2)
    assert [state.step for state in (before, after, last)] == [1, 2, 3]
    assert not same(after.params, last.params) and not last.halted
    assert not same(after.running, last.running)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))


def test_from_a_step_on_that_is_to_stop_the_run_no_parameter_changes():
    _, before, after, last = take("stop")
    for state in (after, last):
        assert same((state.params, state.running), (before.params, before.running))
        assert state.halted
    assert not before.halted and last.step == 3


# -- What is said of the figures ------------------------------------------------------


def sums(loss: float) -> dict[str, Ratio]:
    one = jnp.ones(())
    return {"loss": Ratio(loss * one, one), "grad_norm": Ratio(one, one)}


class Taken:
    """A log of steps with given losses, and the lines that it wrote."""

    def __init__(self, unlogged: Figures | None = None):
        self.lines: list[dict[str, float]] = []
        self.log = StepLog(self.write, unlogged, on_nan="skip")
        self.step = len(unlogged or ())

    def write(self, step: int, values: dict[str, float]) -> None:
        self.lines.append(values)

    def take(self, *losses: float) -> None:
        for loss in losses:
            self.step += 1
            self.log.add(self.step, sums(loss), 1)

    def line(self, *losses: float) -> None:
        self.take(*losses)
        self.log.end_interval()
        self.log.catch_up()


def test_skipped_updates_are_counted_and_in_no_mean(capsys: pytest.CaptureFixture):
    taken = Taken()
    for losses in ((1.0, np.nan, 3.0), (np.inf,), (4.0,)):
        taken.line(*losses)
    assert [line.get("loss") for line in taken.lines] == [2.0, None, 4.0]
    assert [line["skipped_updates"] for line in taken.lines] == [1, 1, 0]
    said = capsys.readouterr().out
    assert said.count("its update is skipped") == 2
    assert "The loss of step 2 is nan" in said


def test_a_checkpoint_remembers_which_updates_were_skipped(
    capsys: pytest.CaptureFixture,
):
    first = Taken()
    first.take(1.0, np.nan)
    unlogged = json.loads(json.dumps(first.log.unlogged(), allow_nan=False))
    again = Taken(unlogged)
    for taken in (first, again):
        taken.line(3.0)
        assert taken.lines[0]["loss"] == 2 and taken.lines[0]["skipped_updates"] == 1
    assert capsys.readouterr().out.count("skipped") == 1


def test_after_too_many_in_succession_a_run_gives_up():
    taken, few = Taken(), [np.nan] * (MOST_SKIPPED - 1)
    taken.line(*few, 1.0, *few)
    with pytest.raises(NotFinite, match="in 10 steps in succession") as error:
        taken.line(np.nan)
    assert error.value.step == 2 * MOST_SKIPPED


# -- Where it began -------------------------------------------------------------------


def all_finite() -> Findings:
    """Two rows of two examples, two layers; every number is 1."""
    one: Any = np.ones(())
    numbers: Any = np.ones((2, 2))
    hidden: Any = np.ones((2, 2, 4))
    weights: Any = {"embedding/embedding": one, "blocks/up/kernel": np.ones(2)}
    return Findings(
        weights, weights, hidden, hidden, numbers, numbers, numbers, numbers,
        weights | {"norm/scale": one}, one,
    )  # fmt: skip


def with_infinity(array: Any, *index: Any) -> Any:
    array = np.array(array)
    array[index] = np.inf
    return array


def test_by_hand_the_first_place_and_its_examples_are_named():
    """What comes later, or reaches a row's other example a layer later, is not."""
    fine: Any = all_finite()
    hidden = with_infinity(fine.hidden, 0, 1, slice(2, None))  # from layer 1 on
    hidden = with_infinity(hidden, 0, 0, 3)
    numbers = with_infinity(fine.losses, 0)
    later = fine._replace(losses=numbers, slopes=with_infinity(numbers, 1))
    up = {"blocks/up/kernel": with_infinity(np.ones(2), 1)}
    out: Any = {"output/embedding": np.array(np.inf)}
    one, row = [[False, True], [False, False]], [[True, True], [False, False]]
    cases: list[tuple[Findings, str, Any]] = [
        (later._replace(hidden=hidden), "layer 1 of the policy", one),
        (
            later._replace(hidden=hidden, weights=up),
            "layer 1 of the policy, not finite in blocks/up/kernel",
            one,
        ),
        (
            fine._replace(reference_hidden=with_infinity(hidden, 1, 0, 0)),
            "the embedding of the reference",
            [[False, False], [True, False]],
        ),
        (
            later._replace(log_probs=numbers, weights=out),
            "the policy's log-probabilities, not finite in output/embedding",
            row,
        ),
        (
            later._replace(reference_log_probs=numbers),
            "the reference's log-probabilities",
            row,
        ),
        (later, "the loss, of log-probabilities that are finite", row),
        (
            later._replace(losses=fine.losses),
            "the derivative of a loss that is finite",
            [[True, True], [True, True]],
        ),
        (
            fine._replace(gradient=fine.gradient | up),
            "the gradient of layer 1, not finite in blocks/up/kernel",
            None,
        ),
        (
            fine._replace(gradient=fine.gradient | up | out),
            "the gradient after the last layer, not finite in output/embedding",
            None,
        ),
        (
            fine._replace(gradient={"embedding/embedding": np.array(np.inf)}),
            "the gradient before the first layer, not finite in embedding/embedding",
            None,
        ),
        (fine, "what does not happen again: computed once more", None),
    ]
    for found, place, slots in cases:
        origin = find_origin(found)
        assert origin.place.startswith(place)
        assert (None if origin.slots is None else origin.slots.tolist()) == slots
    huge = fine._replace(
        gradient={"blocks/up/kernel": np.array([1e25, 2.0])},
        gradient_norm=np.array(np.inf),
    )
    assert "up to 1e+25 in blocks/up/kernel" in find_origin(huge).place


@pytest.fixture(scope="module")
def examine() -> tuple[Model, Callable[[Any, Any, Batch], Findings]]:
    model, loss = make_model(SMALL), make_loss("dpo")
    measure = make_measure(model.apply, loss.needs)
    examine = make_examine(model.trace, measure, loss, all_weights, num_microbatches=2)

    def of(params: Any, reference: Any, batch: Batch) -> Findings:
        state = TrainState(jnp.zeros((), int), jnp.ones((), bool), params, ())
        found = examine(state, np.int32(0), reference, batch)
        return jax.tree.map(np.asarray, found)

    return model, of


def test_a_poisoned_weight_or_token_is_found_where_it_is(examine: Any):
    """Token 121 is of the second example of the first row; the first row holds two."""
    model, of = examine
    params = jax.jit(model.init)(jax.random.key(0))
    examples = random_examples(5)
    examples[1].completions[1][:] = 121
    rows = [examples[:2], examples[2:3], examples[3:4], examples[4:]]
    batch = as_batch(rows, length=48, num_slots=2)
    live = batch.weight > 0
    fine = of(params, params, batch)
    assert "everything is finite" in find_origin(fine).place
    assert (fine.hidden[live] > 0).all() and not fine.hidden[~live].any()
    # The loss is log 2, and its derivative by a log-probability beta / 2 of a fifth.
    np.testing.assert_allclose(fine.losses[live], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(fine.slopes[live], 0.1 / 2 / 5, rtol=1e-5)

    def poisoned(path: tuple[str, ...], *index: int) -> Any:
        changed = copy_params(params)
        *parents, last = path
        inner = changed
        for name in parents:
            inner = inner[name]
        inner[last] = inner[last].at[index].set(jnp.nan)
        return changed

    down = poisoned(("blocks", "mlp", "down", "kernel"), 1, 3, 5)
    origin = find_origin(of(down, params, batch))
    blamed = "not finite in blocks/mlp/down/kernel"
    assert origin.place == f"layer 1 of the policy, {blamed}"
    np.testing.assert_array_equal(origin.slots, live)
    origin = find_origin(of(params, down, batch))
    assert origin.place == f"layer 1 of the reference, {blamed}"
    token = poisoned(("embedding", "embedding"), 121)
    found = of(token, params, batch)
    origin = find_origin(found)
    assert origin.place.startswith("the embedding of the policy")
    assert origin.slots is not None
    assert np.argwhere(origin.slots).tolist() == [[0, 1]]
    assert not np.isfinite(found.hidden[0, 0, -1])  # by its row's attention


@pytest.mark.parametrize(("bad", "row"), [({5}, 5), ({2, 6}, 2), (set(), None)])
def test_a_row_that_suffices_is_found_by_halves(bad: set[int], row: int | None):
    batch = as_batch([[one] for one in random_examples(7)], length=32)
    batch.weight[:, 0] = np.arange(7)
    asked = []

    def examine(half: Batch) -> Any:
        asked.append(sorted(set(half.weight[:, 0].astype(int).tolist())))
        assert len(half.tokens) == 7  # the shape that is compiled already
        norm = np.inf if bad & set(asked[-1]) else 1.0
        return all_finite()._replace(gradient_norm=np.array(norm))

    assert find_row(examine, batch) == row
    assert asked[0] == [0, 1, 2, 3] and len(asked) <= 7


def test_examples_are_located_where_batches_have_them():
    examples = random_examples(40)
    settings: dict[str, Any] = {"batch_size": 8, "num_seen": 80, "seed": 3}
    batches = counted_batches(examples, start=0, stop=10, **settings)
    for step, (_, batch) in enumerate(batches):
        rows = locate(examples, step, **settings)
        assert len(rows) == len(batch.tokens) and sum(map(len, rows)) == 8
        for row, numbers in enumerate(rows):
            for slot, number in enumerate(numbers):
                prompt = examples[number].prompt
                held = batch.tokens[row][batch.example[row] == slot + 1]
                np.testing.assert_array_equal(held[: len(prompt)], prompt)


# -- Runs -----------------------------------------------------------------------------

LOSS = """
import jax.numpy as jnp
from dpojax.losses.objective import Objective
from dpojax.losses.pairs import dpo

def mine(chosen, rejected):
    outcome = dpo(chosen, rejected)
    bad = (chosen.length == {}) & (rejected.length == {})
    return outcome._replace(loss=jnp.where(bad, jnp.nan, outcome.loss))
"""


def test_a_run_names_the_example_and_goes_on_without_it_where_it_is_told_to(
    config: TrainConfig, place: Path
):
    """In the second batch one loss is no number, of log-probabilities that are."""
    loss, mesh = make_configured_loss(config.loss), make_mesh()
    tokenizer = load_policy(config, loss, mesh).tokenizer
    train, test = (
        load_split(config, loss, tokenizer, name) for name in ("train", "test")
    )
    settings: dict[str, Any] = {"batch_size": 4, "num_seen": 16, "seed": 0}
    lengths = [[len(tokens) for tokens in one.completions] for one in (*train, *test)]
    bad = next(
        number
        for row in locate(train, 1, **settings)
        for number in row
        if lengths.count(lengths[number]) == 1
    )
    (place / "mine.py").write_text(LOSS.format(*lengths[bad]))
    output, parts = place / "honest", {"save_every": 1, "sample_prompts": 0}
    mine = LossConfig(name=f"{place / 'mine.py'}:mine")
    config = replace(config, output=str(output), loss=mine, **parts)
    with pytest.raises(FloatingPointError) as error:
        run(config)
    where = output / "nan" / "step-2"
    for part in (
        "The loss of step 2 is nan; the run stops here.",
        "It began in the loss, of log-probabilities that are finite, in the training "
        f"examples {bad} (from 0); what a report needs is in {where}.",
    ):
        assert part in str(error.value)
    report = json.loads((where / "report.json").read_text())
    first, *others = report["examples"]
    assert (first["number"], first["loss"]) == (bad, "not finite")
    assert len(others) == 3 and not any(one["began here"] for one in others)
    prompt = tokenizer.decode(train[bad].prompt.tolist())
    assert first["prompt"] == prompt and report["configuration"]["seed"] == 0
    tokens = load_file(where / "batch.safetensors")["tokens"]
    row = tokens[first["row"]].tolist()
    assert str(train[bad].prompt.tolist())[1:-1] in str(row)
    assert [path.name for path in (output / "checkpoints").glob("[0-9]*")] == ["1"]
    assert run(replace(config, resume=True, on_nan="skip")).step == 4
    rows = [row for row in metrics_of(output) if row["split"] == "train"]
    assert [row.get("skipped_updates") for row in rows] == [None, 1, 0, 0]
    assert "loss" not in rows[1] and rows[2]["loss"] > 0
