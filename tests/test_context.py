"""Positions of rows divided among devices: the numbers of one device that has all.

Rows of several ragged examples that share prompts, on four virtual devices.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import SMALL

from dpojax.batch import Batch
from dpojax.context import make_by_context
from dpojax.data.packing import Example, as_batch
from dpojax.losses.make import make_loss
from dpojax.metrics import summarize
from dpojax.models.decoder import make_model
from dpojax.models.kernels import choose_kernel, make_attend
from dpojax.sharding import (
    as_shardings,
    make_constrain,
    make_look_up,
    make_mesh,
    rows_sharding,
)
from dpojax.spread import Spread
from dpojax.train_step import init_state, make_train_step

SHAPES = {
    "plain": SMALL,
    "window and cap": replace(SMALL, window=7, attention_cap=5.0, tied_output=True),
}
MESHES = {
    "context 4": {"context": 4},
    "data 2, context 2": {"context": 2},
    "fsdp 2, context 2": {"fsdp": 2, "context": 2},
    "tensor 2, context 2": {"tensor": 2, "context": 2},
}


@pytest.fixture(scope="module", autouse=True)
def four_devices() -> Iterator[None]:
    if jax.device_count() != 4:
        pytest.skip("needs the four virtual devices that conftest asks for")
    yield


def make_batch() -> Batch:
    """Branches that cross from device to device, and one row without an example."""
    random = np.random.default_rng(0)

    def tokens(least: int, most: int) -> np.ndarray:
        return random.integers(3, 128, random.integers(least, most)).astype(np.int32)

    def example() -> Example:
        return Example(tokens(1, 6), (tokens(2, 7), tokens(2, 7)))

    rows = [[example(), example()] for _ in range(3)]
    return as_batch([*rows, []], length=32, num_slots=2)


@lru_cache
def take_step(shape: str, objective: str, mesh_name: str | None) -> Any:
    """The metrics of a step of size 1, and the parameters after it."""
    config, loss, optimizer = SHAPES[shape], make_loss(objective), optax.sgd(1.0)
    batch, options, how = make_batch(), {}, {}
    sizes: Any = None if mesh_name is None else MESHES[mesh_name]
    mesh = None if sizes is None else make_mesh(**sizes)
    if mesh is not None:
        options = {
            "constrain": make_constrain(mesh),
            "look_up": make_look_up(mesh),
            "attend": make_attend("xla", by_context=make_by_context(mesh)),
        }
    model = make_model(config, **options)
    params, reference = (jax.jit(model.init)(jax.random.key(n)) for n in (0, 1))
    state = init_state(params, optimizer, loss)
    if mesh is not None:
        shardings = as_shardings(state, mesh)
        state = jax.device_put(state, shardings)
        reference = jax.device_put(reference, as_shardings(reference, mesh))
        batch = jax.device_put(batch, rows_sharding(mesh))
        how = {
            "state_shardings": shardings,
            "rows_sharding": rows_sharding(mesh),
            "spread": Spread(mesh),
        }
    step: Any = make_train_step(model.apply, loss, optimizer, **how)
    state, sums = step(state, reference, batch)
    return summarize(jax.device_get(sums)), jax.device_get(state.params)


@pytest.mark.parametrize(
    ("shape", "mesh"),
    [*(("plain", mesh) for mesh in MESHES), ("window and cap", "fsdp 2, context 2")],
)
def test_loss_and_gradients_are_those_of_one_device(shape: str, mesh: str):
    check("dpo", shape, mesh)


@pytest.mark.parametrize("objective", ["aot", "ld_dpo", "tdpo2"])
def test_statistics_of_batches_prefixes_and_tokens_are_those_of_one_device(
    objective: str,
):
    check(objective, "plain", "data 2, context 2")


def check(objective: str, shape: str, mesh: str) -> None:
    values, params = take_step(shape, objective, None)
    found_values, found = take_step(shape, objective, mesh)
    for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
        assert found_values[name] == pytest.approx(values[name], rel=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        params,
    )


def test_no_device_has_the_hidden_states_of_whole_rows():
    """Nor an MLP's inside: of 2 rows and 20 positions it has 10."""
    mesh = make_mesh(context=2)
    attend = make_attend("xla", by_context=make_by_context(mesh))
    model = make_model(SMALL, constrain=make_constrain(mesh), attend=attend)
    batch = as_batch([[Example(np.arange(5, 9), ())]] * 4, length=20, num_completions=1)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows_sharding(mesh)),
        jax.tree.map(jnp.asarray, batch),
    )
    compiled = jax.jit(model.apply).lower(model.params, shapes).compile().as_text()
    assert compiled is not None
    width = SMALL.mlp_width
    assert f"f32[2,10,{width}]" in compiled or f"f32[20,{width}]" in compiled
    assert f"f32[2,20,{width}]" not in compiled and f"f32[40,{width}]" not in compiled


def test_what_cannot_be_divided_is_refused():
    attend = make_by_context(make_mesh(context=4))(lambda *arrays, **fixed: arrays[0])
    heads, numbers = jnp.zeros((2, 30, 2, 8)), jnp.zeros((2, 30), jnp.int32)
    with pytest.raises(ValueError, match="30 positions.*--row-length"):
        attend(heads, heads, heads, numbers, numbers, window=None)
    with pytest.raises(ValueError, match="--attention flash needs whole rows"):
        choose_kernel("flash", 64, "tpu", num_contexts=2)
    assert choose_kernel("auto", 64, "tpu", num_contexts=2) == "xla"
