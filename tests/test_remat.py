"""What the backward pass keeps of a layer changes memory and work, and no number."""

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import AS_USERS_DO

from dpojax.data.packing import Example, as_batch
from dpojax.models.decoder import DecoderConfig, make_model
from dpojax.models.remat import Remat
from dpojax.sharding import make_constrain, make_mesh, rows_sharding

CONFIG = DecoderConfig(
    vocabulary_size=64,
    width=32,
    num_layers=3,
    num_heads=4,
    num_key_heads=2,
    head_dimension=8,
    mlp_width=48,
)


class Gradient(NamedTuple):
    numbers: list[np.ndarray]  # the loss, then its gradients
    flops: float  # of the compiled program, a layer's counted once
    on_host: bool  # whether anything is kept there


@lru_cache
def gradient_of(remat: Remat) -> Gradient:
    """Of a sum of squared hidden states, rows on four devices."""
    mesh = make_mesh()
    model = make_model(CONFIG, remat=remat, constrain=make_constrain(mesh))

    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.sum(jnp.square(model.apply(params, batch)[0]))

    tokens = np.random.default_rng(0).integers(1, 64, (4, 3, 7)).astype(np.int32)
    rows = [[Example(prompt, (one, two))] for prompt, one, two in tokens]
    batch = jax.device_put(as_batch(rows, length=24), rows_sharding(mesh))
    params = jax.jit(model.init)(jax.random.key(0))
    traced = jax.jit(jax.value_and_grad(loss)).trace(params, batch)
    compiled = traced.lower().compile()
    costs: Any = compiled.cost_analysis()
    numbers = [np.asarray(x) for x in jax.tree.leaves(compiled(params, batch))]
    # As CPUs have one memory, the compiled program does not say it.
    return Gradient(numbers, costs["flops"], "<host>" in str(traced.jaxpr))


@pytest.mark.parametrize("remat", ["full", "dots_except_up"])  # defaults; of CPUs last
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_forward_pass_is_the_same_bit_for_bit_where_its_gradient_is_taken(
    compute_dtype: str, remat: Remat
):
    """So at step 0 the policy is the reference. The model is as wide as it takes.

    What XLA contracts depends on the CPU; XLA_FLAGS=--xla_cpu_max_isa=AVX2 plays one.
    """
    wide = replace(CONFIG, width=64, head_dimension=16, mlp_width=128)
    model = make_model(wide, remat=remat, compute_dtype=jnp.dtype(compute_dtype))
    params = jax.jit(model.init)(jax.random.key(0))
    numbers = np.random.default_rng(0).integers(1, 64, (8, 80)).astype(np.int32)
    rows = [[Example(row[:9], (row[9:39], row[39:]))] for row in numbers]
    batch = as_batch(rows, length=96)

    def forward(params: Any) -> jax.Array:
        return model.apply(params, batch)[0]

    def with_gradient(params: Any) -> tuple[jax.Array, Any]:
        hidden, pull = jax.vjp(forward, params)
        return hidden, pull(hidden)

    def compiled(function: Any) -> Any:
        # The tests' own flags would fuse other operations.
        lowered = jax.jit(function).lower(params)
        return lowered.compile(compiler_options=AS_USERS_DO)(params)

    assert np.array_equal(compiled(forward), compiled(with_gradient)[0])


@pytest.mark.parametrize("remat", [name for name in get_args(Remat) if name != "none"])
def test_loss_and_gradients_equal_those_of_keeping_everything(remat: Remat):
    for found, expected in zip(
        gradient_of(remat).numbers, gradient_of("none").numbers, strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_each_policy_recomputes_less_than_the_leaner_one():
    names: list[Remat] = ["none", "dots", "dots_except_up", "save_attention", "full"]
    flops = [gradient_of(name).flops for name in names]
    assert flops == sorted(flops)
    assert len(set(flops)) == len(flops)


def test_offloading_alone_moves_anything_to_the_host():
    on_host = [name for name in get_args(Remat) if gradient_of(name).on_host]
    assert on_host == ["offload"]
