"""The jitted step: TRL's trajectories, step 0, sharding, microbatches, one compilation.

One small model serves all tests; where numbers must agree it is TRL's fixture.
"""

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import AS_USERS_DO
from safetensors.numpy import load_file
from tiny_models import SMALL

from dpojax.batch import Batch
from dpojax.data.packing import (
    Example,
    as_batch,
    bucket_length,
    row_length,
    with_mismatched,
)
from dpojax.losses.make import Loss, make_loss
from dpojax.metrics import summarize
from dpojax.models.decoder import Model, make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.huggingface import read_params, read_settings, write_model
from dpojax.optimizer import make_optimizer, make_schedule
from dpojax.reference import bema, copy_params, tr_dpo
from dpojax.reference_cache import find_cache
from dpojax.reference_pass import make_reference_step, with_reference
from dpojax.sharding import (
    as_shardings,
    make_constrain,
    make_look_up,
    make_mesh,
    make_placement,
    rows_sharding,
)
from dpojax.train_step import TrainState, init_state, make_eval_step, make_train_step


def random_examples(count: int, seed: int = 0, completions: int = 2) -> list[Example]:
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(1, 128, rng.integers(low, high)).astype(np.int32)

    return [
        Example(tokens(1, 9), tuple(tokens(1, 12) for _ in range(completions)))
        for _ in range(count)
    ]


def supervised_examples(loss: Loss, seed: int) -> list[Example]:
    """Eight examples of the kind that a loss takes, their scores drawn at random."""
    count = {"single": 1, "judged": 1, "pair": 2, "ranked": 3}[loss.kind]
    rng = np.random.default_rng(seed)
    examples = []
    for example in random_examples(8, seed=seed, completions=count):
        scores = sorted(rng.normal(size=count).tolist(), reverse=True)
        if loss.kind == "judged":
            scores = [float(rng.integers(2))]
        examples.append(example._replace(scores=tuple(scores)))
    mismatched = "mismatched" in loss.needs
    return with_mismatched(examples, 32) if mismatched else examples


def one_per_row(examples: list[Example], length: int = 32) -> Batch:
    completions = len(examples[0].completions)
    rows = [[example] for example in examples]
    return as_batch(rows, length=length, num_completions=completions)


def constant_adamw(learning_rate: float = 1e-3, **settings: Any):
    schedule = make_schedule(
        "constant", learning_rate=learning_rate, num_steps=10, warmup_steps=0
    )
    return make_optimizer("adamw", schedule, **settings)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(SMALL)


@pytest.fixture(scope="module")
def params(model: Model) -> Any:
    return jax.jit(model.init)(jax.random.key(0))


# -- Against TRL's own run ------------------------------------------------------------

# What each run set; the recording holds the rest.
TRAJECTORIES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid_chat": {},
    "sigmoid_noref": {},
    "sigmoid_maxlen32": {},
    "sigmoid_precompute": {},
    "sigmoid_gc": {},
    "sigmoid_accum2": {"num_microbatches": 2},
    "sigmoid_wd_noclip": {"weight_decay": 0.1, "max_grad_norm": 0.0},
    "sigmoid_linear_warmup": {"schedule": "linear", "warmup_steps": 2},
    "sigmoid_sync_ref": {"sync_every": 2},
    "sft": {"loss": "sft"},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "exo_pair": {"loss": "exo_pair"},
    "nca_pair": {"loss": "nca_pair"},
    "robust": {"loss": "robust_dpo"},
    "bco_pair": {"loss": "bco_pair"},
    "sppo_hard": {"loss": "sppo_hard"},
    "aot": {"loss": "aot"},
    "aot_unpaired": {"loss": "aot_unpaired"},
    "apo_zero": {"loss": "apo_zero"},
    "apo_down": {"loss": "apo_down"},
    "discopop": {"loss": "discopop"},
    "sigmoid_norm": {"loss": "dpo_norm"},
    "sigmoid_ld05": {"loss": "ld_dpo"},
    "sigmoid_wpo": {"loss": "wpo"},
    "sigmoid_forward_kl": {"loss": "f_dpo", "divergence": "forward_kl"},
    "sigmoid_js_divergence": {"loss": "f_dpo"},
    "sigmoid_alpha_divergence": {"loss": "f_dpo", "divergence": "alpha_divergence"},
    "mpo": {"loss": "mpo"},
}


@lru_cache
def fixture_model(directory: Path) -> tuple[Model, dict]:
    settings = read_settings(directory)
    return make_model(as_decoder_config(settings)), settings


def load(directory: Path) -> Any:
    abstract = fixture_model(directory)[0].params
    return read_params(directory, abstract, as_shardings(abstract, make_mesh()))


@lru_cache
def fixture_step(directory: Path, **settings: Any):
    """One compiled step for all the trajectories that share it."""
    schedule = make_schedule(
        settings.get("schedule", "constant"),
        learning_rate=1e-4,
        num_steps=6,
        warmup_steps=settings.get("warmup_steps", 0),
    )
    optimizer = make_optimizer(
        "adamw",
        schedule,
        max_grad_norm=settings.get("max_grad_norm", 1.0),
        weight_decay=settings.get("weight_decay", 0.0),
    )
    own = {} if settings.get("loss") == "sft" else {"beta": 0.1}
    if "divergence" in settings:
        own["divergence"] = settings["divergence"]
    movement = None
    if "sync_every" in settings:
        movement = tr_dpo(every=settings["sync_every"])
    step = make_train_step(
        fixture_model(directory)[0].apply,
        make_loss(settings.get("loss", "dpo"), **own),
        optimizer,
        num_microbatches=settings.get("num_microbatches", 1),
        movement=movement,
    )
    return step, optimizer, schedule, movement


def recorded_examples(record: dict, num_completions: int) -> list[Example]:
    """The ids that TRL trained on, cut as its collator cuts: the first max_length."""
    limit = record["args"]["max_length"]
    examples = []
    for row in record["examples"]:
        prompt = row["prompt_ids"]
        names = ("chosen_ids", "rejected_ids")[:num_completions]
        kept = [np.array(row[name][: limit - len(prompt)], np.int32) for name in names]
        examples.append(Example(np.array(prompt, np.int32), tuple(kept)))
    return examples


# Each compiles a step of its own; one of every way of computing runs with every change.
QUICK = ["sigmoid_accum2", "sigmoid_wd_noclip", "sigmoid_linear_warmup", "sft", "aot"]
QUICK += ["sigmoid", "sigmoid_chat", "sigmoid_noref", "sigmoid_maxlen32", "mpo"]
QUICK += ["sigmoid_precompute", "sigmoid_gc", "sigmoid_sync_ref", "sigmoid_ld05"]


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in TRAJECTORIES
    ],
)
def test_every_step_agrees_with_trls(name: str, shared: Path, tmp_path: Path):
    peers = shared / "peers"
    record = json.loads((peers / "trajectories" / f"{name}.json").read_text())
    settings = TRAJECTORIES[name]
    directory = peers / "fixture" / "model"
    step, optimizer, schedule, movement = fixture_step(directory, **settings)
    params = load(directory)
    has_reference = settings.get("loss") != "sft"
    reference = load(peers / "fixture" / "ref_model") if has_reference else None
    if name == "sigmoid_noref":
        reference = copy_params(params)
    examples = recorded_examples(record, 2 if has_reference else 1)
    if name == "sigmoid_precompute":
        examples = with_reference(
            examples,
            make_reference_step(fixture_model(directory)[0].apply, make_mesh()),
            lambda reference=reference: reference,
            find_cache(tmp_path, {}),
            batch_size=8,
            placement=make_placement(make_mesh()),
        )
        reference = None
    length = bucket_length(128)
    assert max(map(row_length, examples)) <= length
    size = len(examples) // len(record["steps"])
    state = init_state(params, optimizer)
    if movement is not None:
        state = state._replace(moving=movement.init(params, reference))
        reference = None
    for index, wanted in enumerate(record["steps"]):
        batch = one_per_row(examples[index * size :][:size], length)
        state, sums = step(state, reference, batch)
        got = summarize(sums) | {"learning_rate": np.asarray(schedule(index)).item()}
        compare_step(got, wanted, has_reference, name)
    compare_params(state, record, fixture_model(directory)[1], tmp_path / "final")


def compare_step(got: dict, wanted: dict, has_reference: bool, name: str) -> None:
    # TRL logs the gradient norm of an accumulated step, but sums of metrics twice as
    # wide as ours are means of means there; equal microbatches make them agree.
    # DiscoPOP divides the margin, and its rounding, by tau = 0.05; steps add up.
    looser = 20 if name == "discopop" else 1
    names = ["loss", "logps/chosen"]
    if has_reference:
        names += ["logps/rejected", "rewards/chosen", "rewards/rejected"]
        if name == "sigmoid_ld05":  # where TRL logs weighted sums as log-probabilities
            names = [metric for metric in names if "logps" not in metric]
        # A small difference of two numbers carries the error of both.
        size = abs(wanted["rewards/chosen"]) + abs(wanted["rewards/rejected"])
        difference = got["rewards/margins"] - wanted["rewards/margins"]
        assert abs(difference) <= looser * (1e-4 * size + 2e-5)
    for metric in names:
        np.testing.assert_allclose(
            got[metric],
            wanted[metric],
            rtol=looser * 1e-4,
            atol=looser * 2e-5,
            err_msg=metric,
        )
    tolerance = looser * 1e-3
    np.testing.assert_allclose(got["grad_norm"], wanted["grad_norm"], rtol=tolerance)
    np.testing.assert_allclose(got["learning_rate"], wanted["learning_rate"], rtol=1e-6)
    if has_reference and name != "sigmoid_noref":  # ties: TRL counts them as wrong
        assert got["rewards/accuracies"] == wanted["rewards/accuracies"]


def compare_params(state: TrainState, record: dict, settings: dict, path: Path) -> None:
    write_model(path, state.params, settings, lambda _: None)
    tensors = load_file(path / "model.safetensors")
    assert tensors.keys() == record["final_params"].keys()
    for name, wanted in record["final_params"].items():
        norm = np.linalg.norm(tensors[name].astype(np.float64))
        np.testing.assert_allclose(norm, wanted["l2"], rtol=1e-5, err_msg=name)


# -- Step 0 ---------------------------------------------------------------------------


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_at_step_zero_the_loss_is_log_two_and_every_reward_exactly_zero(
    compute_dtype: str,
):
    model = make_model(SMALL, compute_dtype=jnp.dtype(compute_dtype))
    params = jax.jit(model.init)(jax.random.key(1))
    optimizer = constant_adamw()
    step = make_train_step(model.apply, make_loss("dpo"), optimizer)
    batch = one_per_row(random_examples(4))
    reference = copy_params(params)
    arguments = init_state(params, optimizer), reference, batch
    # The tests' own flags would fuse other operations.
    compiled = step.lower(*arguments).compile(compiler_options=AS_USERS_DO)
    values = summarize(compiled(*arguments)[1])
    assert abs(values["loss"] - math.log(2)) < 1e-6
    assert values["rewards/accuracies"] == 0.5
    for name in ("chosen", "rejected", "margins"):
        # A mean of 0 with no spread: every one of them is 0.
        assert values[f"rewards/{name}"] == 0 == values[f"rewards/{name}_se"]


# -- The batch, split -----------------------------------------------------------------


def take_steps(
    model: Model,
    params: Any,
    num_steps: int,
    *,
    objective: str = "dpo",
    num_microbatches: int = 1,
    mesh: Any = None,
) -> tuple[TrainState, dict[str, float], Any]:
    optimizer = constant_adamw()
    loss = make_loss(objective)
    state = init_state(copy_params(params), optimizer, loss)
    reference = copy_params(params) if "reference" in loss.needs else None
    how: dict[str, Any] = {}
    if mesh is not None:
        shardings = as_shardings(state, mesh)
        state = jax.device_put(state, shardings)
        reference = jax.device_put(reference, as_shardings(reference, mesh))
        how = {"state_shardings": shardings, "rows_sharding": rows_sharding(mesh)}
    step = make_train_step(
        model.apply, loss, optimizer, num_microbatches=num_microbatches, **how
    )
    values = {}
    for index in range(num_steps):
        examples = supervised_examples(loss, index)
        longest = max(map(row_length, examples))
        batch = one_per_row(examples, bucket_length(longest, smallest=32))
        if mesh is not None:
            batch = jax.device_put(batch, rows_sharding(mesh))
        state, sums = step(state, reference, batch)
        values = means(sums)
    return state, values, step


def assert_close(first: Any, second: Any, tolerance: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance
        ),
        first,
        second,
    )


def means(sums: Any) -> dict[str, float]:
    """Without standard errors, which are differences of large squares."""
    values = summarize(sums)
    return {name: value for name, value in values.items() if "_se" not in name}


@pytest.fixture(scope="module")
def four_devices() -> Iterator[None]:
    if jax.device_count() != 4:
        pytest.skip("needs the four virtual devices that conftest asks for")
    yield


def test_four_devices_equal_one(model: Model, params: Any, four_devices: None):
    mesh = make_mesh(data=2, fsdp=2)
    pinned = make_model(
        SMALL, constrain=make_constrain(mesh), look_up=make_look_up(mesh)
    )
    single, single_values, _ = take_steps(model, params, 5)
    sharded, sharded_values, step = take_steps(pinned, params, 5, mesh=mesh)
    assert_close(single.params, sharded.params, 1e-5)
    assert_close(single_values, sharded_values, 1e-4)
    kernel = sharded.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 2
    assert step._cache_size() == 1  # no array was moved between steps


def test_tensor_parallel_devices_equal_one(
    model: Model, params: Any, four_devices: None
):
    mesh = make_mesh(data=2, fsdp=1, tensor=2)
    pinned = make_model(SMALL, constrain=make_constrain(mesh))
    single, _, _ = take_steps(model, params, 2)
    sharded, _, _ = take_steps(pinned, params, 2, mesh=mesh)
    assert_close(single.params, sharded.params, 1e-5)


SPLIT = ["dpo", "sft", "mpo", "aot", "aot_unpaired", "beta_dpo", "kto", "bco", "tdpo2"]


@pytest.mark.parametrize("objective", [*SPLIT, "ld_dpo+aot", "plackett_luce"])
def test_microbatches_equal_the_whole_batch(model: Model, params: Any, objective: str):
    whole, values, _ = take_steps(model, params, 1, objective=objective)
    split, split_values, _ = take_steps(
        model, params, 1, objective=objective, num_microbatches=2
    )
    assert values["loss"] == pytest.approx(split_values["loss"], rel=1e-6)
    assert_close(whole.opt_state, split.opt_state, 1e-6)  # moments of the gradient
    assert_close(whole.running, split.running, 1e-6)
    assert_close(values, split_values, 1e-5)


@pytest.mark.parametrize("objective", ["aot", "aot_unpaired", "beta_dpo", "kto", "bco"])
def test_statistics_of_a_batch_are_those_of_all_devices(
    model: Model, params: Any, four_devices: None, objective: str
):
    mesh = make_mesh(data=2, fsdp=2)
    pinned = make_model(SMALL, constrain=make_constrain(mesh))
    single, values, _ = take_steps(model, params, 1, objective=objective)
    sharded, sharded_values, _ = take_steps(
        pinned, params, 1, objective=objective, mesh=mesh
    )
    assert values["loss"] == pytest.approx(sharded_values["loss"], rel=1e-6)
    assert_close(single.opt_state, sharded.opt_state, 1e-6)
    assert_close(single.running, sharded.running, 1e-6)
    assert_close(values, sharded_values, 1e-4)


def test_an_example_of_weight_two_counts_as_two(model: Model, params: Any):
    other = jax.jit(model.init)(jax.random.key(3))
    examples = random_examples(4)
    step = make_eval_step(model.apply, make_loss("mpo"))
    heavy = [examples[0]._replace(weight=2.0), *examples[1:]]
    twice = [examples[0], *examples]
    weighted = means(step(params, other, one_per_row(heavy))[0])["loss"]
    repeated = means(step(params, other, one_per_row(twice))[0])["loss"]
    assert weighted == pytest.approx(repeated, rel=1e-6)


def test_empty_rows_change_nothing(model: Model, params: Any):
    examples = random_examples(3)
    step = make_eval_step(model.apply, make_loss("dpo"))
    full = means(step(params, params, one_per_row(examples))[0])
    rows = [*([example] for example in examples), []]
    padded = means(step(params, params, as_batch(rows, length=32))[0])
    assert_close(full, padded, 1e-6)


def test_several_examples_in_a_row_equal_one_in_each(model: Model, params: Any):
    examples = random_examples(4)
    other = jax.jit(model.init)(jax.random.key(3))
    step = make_eval_step(model.apply, make_loss("dpo"))
    apart = means(step(params, other, one_per_row(examples))[0])
    rows = [examples[:3], examples[3:]]
    packed = as_batch(rows, length=96, num_slots=3)
    assert_close(apart, means(step(params, other, packed)[0]), 1e-5)


def test_the_state_is_donated_and_the_reference_never(model: Model, params: Any):
    optimizer = constant_adamw()
    state = init_state(copy_params(params), optimizer)
    reference = copy_params(params)
    step = make_train_step(model.apply, make_loss("dpo"), optimizer)
    before = jax.tree.leaves(state.params)
    step(state, reference, one_per_row(random_examples(4)))
    assert all(array.is_deleted() for array in before)
    assert not any(array.is_deleted() for array in jax.tree.leaves(reference))
    assert_close(reference, params, 0)


def test_a_plain_function_serves_as_the_model():
    """Embeddings alone: what the step asks of a model is hidden states and a matrix."""

    def apply(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return params["in"][batch.tokens], params["out"]

    keys = jax.random.split(jax.random.key(0))
    params = {
        name: jax.random.normal(key, (128, 16))
        for name, key in zip(("in", "out"), keys, strict=True)
    }
    optimizer = constant_adamw(0.05)
    step = make_train_step(apply, make_loss("dpo"), optimizer)
    state, reference = init_state(copy_params(params), optimizer), params
    batch = one_per_row(random_examples(8))
    losses = []
    for _ in range(10):
        state, sums = step(state, reference, batch)
        losses.append(summarize(sums)["loss"])
    assert losses[-1] < 0.2 < losses[0]


# -- References that move -------------------------------------------------------------


def test_the_reference_of_tr_dpo_moves_every_so_many_steps():
    """From 0 towards policies 1, 2, 3, 4 at steps 2 and 4, by a half: 0, 1, 1, 2.5."""
    movement = tr_dpo(alpha=0.5, every=2)
    state = movement.init({"w": jnp.zeros(())}, {"w": jnp.zeros(())})
    seen = []
    for step in range(1, 5):
        policy = {"w": jnp.asarray(float(step))}
        state = movement.update(state, policy, jnp.asarray(step))
        seen.append(float(state["reference"]["w"]))
    assert seen == [0.0, 1.0, 1.0, 2.5]


def test_the_reference_of_bema_is_the_corrected_average():
    """One parameter, from 1 to 3 at step 4 with lag 5, powers 1/2 and 1.

    The average moves by (5 + 4)^-1/2 = 1/3 of 2, to 5/3; the correction is 2 / 9.
    """
    movement = bema(ema_power=0.5, bias_power=1.0, lag=5.0, every=4)
    start = {"w": jnp.asarray(1.0)}
    state = movement.init(start, start)
    still = movement.update(state, {"w": jnp.asarray(3.0)}, jnp.asarray(3))
    assert still["reference"]["w"] == 1.0
    moved = movement.update(state, {"w": jnp.asarray(3.0)}, jnp.asarray(4))
    np.testing.assert_allclose(moved["average"]["w"], 5 / 3, rtol=1e-6)
    np.testing.assert_allclose(moved["reference"]["w"], 5 / 3 + 2 / 9, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 1.5}, {"every": 0}])
def test_a_movement_that_cannot_be_is_refused(settings: dict[str, Any]):
    with pytest.raises(ValueError, match="reference"):
        movement = tr_dpo(**settings)
        one = {"w": jnp.ones(())}
        movement.update(movement.init(one, one), one, jnp.asarray(1))
