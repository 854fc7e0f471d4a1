"""Adapters beside a frozen base: what they compute, are trained to, cost and refuse."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dpojax.batch import Batch
from dpojax.data.packing import Example, as_batch, bucket_length
from dpojax.losses.make import make_loss
from dpojax.metrics import summarize
from dpojax.models.adapter_modules import choose_modules
from dpojax.models.decoder import DecoderConfig, Model, make_model
from dpojax.models.families import as_decoder_config, as_settings
from dpojax.models.functional import Params
from dpojax.models.huggingface import read_params, read_settings
from dpojax.models.lora import (
    Frozen,
    Lora,
    LoraShape,
    graft,
    make_roles,
    merge_adapters,
    split_adapters,
    start_adapters,
)
from dpojax.models.peft import read_adapters, read_shape
from dpojax.models.quantized import dequantize, make_quantize, quantize
from dpojax.optimizer import make_optimizer
from dpojax.sharding import as_shardings, make_constrain, make_mesh, rows_sharding
from dpojax.spread import Spread
from dpojax.train_step import TrainState, init_state, make_train_step

SMALL = DecoderConfig(
    vocabulary_size=128,
    width=64,
    num_layers=2,
    num_heads=4,
    num_key_heads=2,
    head_dimension=16,
    mlp_width=128,
)
MODULES = frozenset({"attention/query", "attention/output", "mlp/up", "mlp/down"})
SHAPE = LoraShape(modules=MODULES, rank=4, alpha=8.0)
SHAPES = {
    "lora": SHAPE,
    "rslora": replace(SHAPE, scaling="rslora"),
    "dora": replace(SHAPE, kind="dora"),
    "upper": replace(SHAPE, kind="dora", layers=1),
}


def make_batch(count: int = 8, length: int = 32) -> Batch:
    rng = np.random.default_rng(0)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(1, 128, rng.integers(low, high)).astype(np.int32)

    rows = [
        [Example(tokens(1, 9), (tokens(1, 12), tokens(1, 12)))] for _ in range(count)
    ]
    return as_batch(rows, length=length, num_completions=2)


@cache
def adapted(shape: LoraShape) -> tuple[Model, Params, Params]:
    """A model, its base, and adapters as they start."""
    model = make_model(SMALL, lora=shape)
    base = jax.jit(model.init)(jax.random.key(0))
    adapters = jax.jit(model.init_adapters)(jax.random.key(1))
    return model, base, start_adapters(base, adapters)


def moved(adapters: Params) -> Params:
    """Adapters as training might leave them."""
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters
    )


@cache
def compiled(shape: LoraShape) -> Any:
    return jax.jit(adapted(shape)[0].apply)  # once for each tree of parameters


def hidden_of(shape: LoraShape, params: Params) -> jax.Array:
    return compiled(shape)(params, make_batch())[0]


# -- What they compute ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_at_first_the_adapted_model_is_its_base_bit_for_bit(kind: str):
    shape = SHAPES[kind]
    _, base, adapters = adapted(shape)
    with_adapters = hidden_of(shape, graft(base, adapters))
    np.testing.assert_array_equal(with_adapters, hidden_of(shape, base))
    other = hidden_of(shape, graft(base, moved(adapters)))
    assert float(jnp.abs(other - with_adapters).max()) > 0.1


def test_at_first_doras_model_is_its_base_up_to_rounding():
    shape = SHAPES["dora"]
    _, base, adapters = adapted(shape)
    with_adapters = hidden_of(shape, graft(base, adapters))
    np.testing.assert_allclose(with_adapters, hidden_of(shape, base), atol=3e-6)


@pytest.mark.parametrize("kind", SHAPES)
def test_merged_weights_compute_what_adapters_do(kind: str):
    shape = SHAPES[kind]
    _, base, adapters = adapted(shape)
    params = graft(base, moved(adapters))
    merged = jax.jit(lambda params: merge_adapters(params, shape))(params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(
        hidden_of(shape, merged), hidden_of(shape, params), rtol=1e-5, atol=1e-5
    )


def test_a_projection_gains_the_scaled_product_of_the_two_matrices():
    """kernel + (alpha / rank) A B, or over the root of the rank: 8 / 4 and 8 / 2."""
    assert SHAPES["lora"].scale == 2.0
    assert SHAPES["rslora"].scale == 4.0
    _, base, adapters = adapted(SHAPE)
    params = graft(base, moved(adapters))
    merged = merge_adapters(params, SHAPE)["blocks"]["attention"]["query"]["kernel"]
    query = params["blocks"]["attention"]["query"]
    product = np.asarray(query["lora"]["a"][1]) @ np.asarray(query["lora"]["b"][1])
    wanted = np.asarray(query["kernel"][1]) + 2 * product
    np.testing.assert_allclose(merged[1], wanted, rtol=1e-5, atol=1e-6)


def test_each_output_of_dora_has_the_norm_of_its_magnitude():
    _, base, adapters = adapted(SHAPES["dora"])
    params = graft(base, moved(adapters))
    merged = merge_adapters(params, SHAPES["dora"])["blocks"]["mlp"]["up"]["kernel"]
    magnitude = params["blocks"]["mlp"]["up"]["lora"]["magnitude"]
    norms = np.linalg.norm(merged, axis=1)
    np.testing.assert_allclose(norms, np.abs(magnitude), rtol=1e-5)


# -- Training -------------------------------------------------------------------------


def constant_adamw(learning_rate: float = 1e-2) -> optax.GradientTransformation:
    return make_optimizer("adamw", optax.constant_schedule(learning_rate))


def copied(tree: Params) -> Params:
    return jax.tree.map(jnp.copy, tree)  # a step donates what it is given


@cache
def make_step(shape: LoraShape, **settings: Any) -> Any:
    optimizer = constant_adamw()
    step = make_train_step(
        adapted(shape)[0].apply,
        make_loss("dpo"),
        optimizer,
        roles=make_roles(shape),
        **settings,
    )
    return step, optimizer


def trained(shape: LoraShape, steps: int, **settings: Any) -> TrainState:
    _, base, adapters = adapted(shape)
    step, optimizer = make_step(shape, **settings)
    state = init_state(copied(adapters), optimizer)
    for _ in range(steps):
        state, _ = step(state, Frozen(base), make_batch())
    return state


def test_the_base_is_the_reference_and_the_first_loss_is_log_2():
    _, base, adapters = adapted(SHAPE)
    step, optimizer = make_step(SHAPE)
    before = jax.tree.map(np.asarray, base)
    state = init_state(copied(adapters), optimizer)
    state, sums = step(state, Frozen(base), make_batch())
    first = summarize(sums)
    assert abs(first["loss"] - np.log(2)) < 1e-7 and first["rewards/chosen"] == 0
    state, sums = step(state, Frozen(base), make_batch())
    assert summarize(sums)["loss"] < np.log(2) - 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, base)  # the base has not moved
    assert split_adapters(state.params)[0] == {}  # nor is it part of the state


def test_adapters_of_the_reference_are_its_own():
    _, base, adapters = adapted(SHAPE)
    first = moved(adapters)
    step, optimizer = make_step(SHAPE)

    def loss(frozen: Frozen) -> float:
        state = init_state(copied(first), optimizer)
        return summarize(step(state, frozen, make_batch())[1])["loss"]

    assert abs(loss(Frozen(base, first)) - np.log(2)) < 1e-7
    assert abs(loss(Frozen(base)) - np.log(2)) > 1e-3


def test_dropout_draws_new_masks_each_step_and_none_for_the_reference():
    shape = replace(SHAPE, dropout=0.5)
    _, base, adapters = adapted(shape)
    adapters, roles = moved(adapters), make_roles(shape, seed=3)
    drawn = [roles(adapters, Frozen(base), jnp.int32(i)) for i in (0, 0, 1)]
    same, again, other = (hidden_of(shape, policy) for policy, _ in drawn)
    np.testing.assert_array_equal(same, again)
    assert float(jnp.abs(same - other).max()) > 0.1
    assert drawn[0][1] is base


def test_dropout_leaves_the_mean_of_what_an_adapter_adds():
    shape = replace(SHAPE, dropout=0.25)
    hidden = jax.random.normal(jax.random.key(0), (5, 64))

    def added(key: jax.Array) -> jax.Array:
        lora = Lora(shape, 64, 8, nnx.Rngs(0))
        lora.b[...] = jax.random.normal(jax.random.key(1), (4, 8))
        lora.dropout_key[...] = key
        return lora(hidden, jnp.zeros((64, 8)), jnp.zeros((5, 8)))

    masks = jax.vmap(added)(jax.random.split(jax.random.key(2), 4096))
    plain = Lora(SHAPE, 64, 8, nnx.Rngs(0)).a[...]
    wanted = SHAPE.scale * hidden @ plain @ jax.random.normal(jax.random.key(1), (4, 8))
    error = jnp.std(masks, axis=0) / 64
    assert float((jnp.abs(masks.mean(axis=0) - wanted) / error).max()) < 5


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_microbatches_take_the_step_of_the_whole_batch(kind: str):
    whole = trained(SHAPES[kind], steps=1).opt_state
    parts = trained(SHAPES[kind], steps=1, num_microbatches=4).opt_state

    def compare(found: jax.Array, wanted: jax.Array) -> None:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)

    jax.tree.map(compare, parts, whole)


@pytest.mark.parametrize(
    ("kind", "sizes"), [("lora", (2, 2, 1)), ("lora", (1, 2, 2)), ("dora", (1, 2, 2)),
     ("upper", (1, 2, 2))]
)  # fmt: skip
def test_sharded_adapters_are_trained_as_on_one_device(kind: str, sizes: tuple):
    mesh, shape = make_mesh(*sizes), SHAPES[kind]
    _, base, adapters = adapted(shape)
    model = make_model(SMALL, lora=shape, constrain=make_constrain(mesh))
    optimizer = constant_adamw()
    step = make_train_step(
        model.apply,
        make_loss("dpo"),
        optimizer,
        spread=Spread(mesh),
        roles=make_roles(shape),
    )
    base = jax.device_put(base, as_shardings(base, mesh))
    placed = jax.device_put(copied(adapters), as_shardings(adapters, mesh))
    query = placed["blocks"]["attention"]["query"]["lora"]
    assert not query["a"].sharding.is_fully_replicated
    state = init_state(placed, optimizer)
    batch = jax.device_put(make_batch(), rows_sharding(mesh))
    for _ in range(2):
        state, _ = step(state, Frozen(base), batch)

    def compare(found: jax.Array, wanted: jax.Array) -> None:
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)

    jax.tree.map(compare, state.params, trained(shape, steps=2).params)


def test_every_step_agrees_with_trls_and_pefts_recorded(shared: Path):
    trajectories = shared / "peers" / "trajectories"
    record = json.loads((trajectories / "sigmoid_lora.json").read_text())
    state = agree_with(
        record, trajectories / "sigmoid_lora_init", shared, tolerance=1e-4
    )
    compare_adapters(state, record)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "use_dora": True}])
def test_ten_steps_agree_with_trl_and_peft_run_beside(
    more: dict, shared: Path, tmp_path: Path
):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    peers, targets = shared / "peers", ["q_proj", "v_proj", "down_proj"]
    lora = {"r": 4, "lora_alpha": 8, "target_modules": targets} | more
    arguments = {
        "model": peers / "fixture" / "model",
        "data": peers / "fixture" / "prefs.jsonl",
        "out": tmp_path / "record.json",
        "steps": 10,
        "lr": 1e-3,
        "lora": json.dumps(lora),
        "save-init": tmp_path / "start",
    }
    flags = [part for key, value in arguments.items() for part in (f"--{key}", value)]
    subprocess.run([sys.executable, peers / "run_trl.py", *map(str, flags)], check=True)
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["steps"]) == 10
    state = agree_with(record, tmp_path / "start", shared, tolerance=1e-4)
    compare_adapters(state, record)


def agree_with(
    record: dict, start: Path, shared: Path, *, tolerance: float
) -> TrainState:
    """Takes each recorded step, from the recorded adapters, and compares it."""
    directory = shared / "peers" / "fixture" / "model"
    settings = read_settings(directory)
    config = as_decoder_config(settings)
    shapes = make_model(config).params
    shape = read_shape(start, shapes, settings)
    model = make_model(config, lora=shape)
    base = read_params(directory, shapes, as_shardings(shapes, make_mesh()))
    like = jax.eval_shape(model.init_adapters, jax.random.key(0))
    adapters = read_adapters(start, shape, like, shapes, settings)
    optimizer = constant_adamw(record["args"]["lr"])
    step = make_train_step(
        model.apply, make_loss("dpo", beta=0.1), optimizer, roles=make_roles(shape)
    )
    state = init_state(jax.tree.map(jnp.asarray, adapters), optimizer)
    size = len(record["examples"]) // len(record["steps"])
    for index, wanted in enumerate(record["steps"]):
        rows = [
            [Example(ids(row, "prompt"), (ids(row, "chosen"), ids(row, "rejected")))]
            for row in record["examples"][index * size :][:size]
        ]
        batch = as_batch(rows, length=bucket_length(128), num_completions=2)
        state, sums = step(state, Frozen(base), batch)
        values = summarize(sums)
        for metric in ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen"):
            np.testing.assert_allclose(
                values[metric], wanted[metric], tolerance, 2e-5, err_msg=metric
            )
        np.testing.assert_allclose(values["grad_norm"], wanted["grad_norm"], 1e-3)
    return state


def ids(row: dict, kind: str) -> np.ndarray:
    return np.array(row[f"{kind}_ids"], np.int32)


def compare_adapters(state: TrainState, record: dict) -> None:
    """The norm of every adapter after the last step."""
    ours = {"q_proj": "query", "v_proj": "value", "down_proj": "down"}
    kinds = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}
    for name, wanted in record["final_params"].items():
        parts = name.split(".")
        layer = int(parts[parts.index("layers") + 1])
        projection = next(part for part in parts if part in ours)
        kind = next(part for part in parts if part in kinds)
        room = "mlp" if projection == "down_proj" else "attention"
        lora = state.params["blocks"][room][ours[projection]]["lora"]
        found = np.linalg.norm(np.asarray(lora[kinds[kind]][layer], np.float64))
        np.testing.assert_allclose(found, wanted["l2"], rtol=1e-4, err_msg=name)


# -- What they cost -------------------------------------------------------------------


def test_a_step_of_a_billion_parameters_keeps_one_base_and_the_adapters_state():
    """Llama-3.2-1B's shape, compiled and not run: bytes by the compiler."""
    config = DecoderConfig(
        vocabulary_size=128_256,
        width=2048,
        num_layers=16,
        num_heads=32,
        num_key_heads=8,
        head_dimension=64,
        mlp_width=8192,
        tied_output=True,
    )
    shape = LoraShape(modules=frozenset({"attention/query"}), rank=16, alpha=32.0)
    model = make_model(config, param_dtype=jnp.bfloat16, lora=shape)
    optimizer = constant_adamw()
    step = make_train_step(
        model.apply, make_loss("dpo"), optimizer, roles=make_roles(shape)
    )
    adapters = jax.eval_shape(model.init_adapters, jax.random.key(0))
    state = jax.eval_shape(lambda: init_state(adapters_of_zeros(adapters), optimizer))
    batch = make_batch(count=1)
    memory = step.lower(state, Frozen(model.params), batch).compile().memory_analysis()
    assert memory is not None
    base, trained = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (model.params, state)
    )
    small = 100_000  # the batch and the metrics
    assert base > 2.4e9 and trained < 2e7
    assert memory.argument_size_in_bytes < base + trained + small
    assert memory.output_size_in_bytes < trained + small
    assert memory.alias_size_in_bytes > trained - small  # donated, not copied


def adapters_of_zeros(shapes: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


# -- Quantised bases ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_is_its_own_reference_and_adapters_learn_on_it(kind: Any):
    model = make_model(SMALL, quantization=kind, lora=SHAPE)
    _, base, adapters = adapted(SHAPE)
    convert = make_quantize(kind)
    name = jax.tree_util.keystr
    small = jax.tree.map_with_path(
        lambda path, leaf: convert(name(path, simple=True, separator="/"), leaf), base
    )
    kernel = small["blocks"]["mlp"]["up"]["kernel"]
    assert kernel["values"].dtype == (jnp.int8 if kind == "int8" else jnp.uint4)
    optimizer = constant_adamw()
    step = make_train_step(
        model.apply, make_loss("dpo"), optimizer, roles=make_roles(SHAPE)
    )
    state = init_state(copied(adapters), optimizer)
    state, first = step(state, Frozen(small), make_batch())
    state, second = step(state, Frozen(small), make_batch())
    assert abs(summarize(first)["loss"] - np.log(2)) < 1e-7
    assert summarize(second)["loss"] < np.log(2) - 1e-3


def test_int8_rounds_to_a_127th_of_each_outputs_largest_weight():
    kernel = jax.random.normal(jax.random.key(0), (64, 8))
    back = dequantize(quantize(kernel, "int8"))
    step = jnp.abs(kernel).max(axis=0) / 127
    assert float((jnp.abs(back - kernel) / step).max()) <= 0.51


def test_nf4_takes_the_nearest_of_its_sixteen_values_in_each_block():
    """QLoRA, appendix E: the sixteen values, times the largest weight of 64."""
    values = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    kernel = np.asarray(jax.random.normal(jax.random.key(0), (128, 3)))
    blocks = kernel.reshape(2, 64, 3)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[..., None] / scale[..., None] - values).argmin(axis=-1)
    wanted = (np.array(values)[nearest] * scale).reshape(128, 3)
    found = dequantize(quantize(jnp.asarray(kernel), "nf4"))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


# -- Targets --------------------------------------------------------------------------

SETTINGS = as_settings(SMALL)
BASE = make_model(SMALL).params


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (("q_proj", "v_proj"), {"attention/query", "attention/value"}),
        (("self_attn.o_proj",), {"attention/output"}),
        ((r".*\.(up|down)_proj",), {"mlp/up", "mlp/down"}),
        (("all-linear",), {"attention/query", "attention/key", "attention/value",
                           "attention/output", "mlp/gate", "mlp/up", "mlp/down"}),
    ],
)  # fmt: skip
def test_targets_are_names_or_regular_expressions_of_names(targets: tuple, wanted: set):
    assert choose_modules(targets, BASE, SETTINGS) == wanted


def test_a_target_that_is_not_there_or_not_in_every_layer_is_refused():
    with pytest.raises(ValueError, match="'query' matches no projection.*q_proj"):
        choose_modules(["query"], BASE, SETTINGS)
    with pytest.raises(ValueError, match="does not match model.layers.1.*every layer"):
        choose_modules([r".*layers\.0\..*q_proj"], BASE, SETTINGS)
