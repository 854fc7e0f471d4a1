"""The seam to Flax: modules of both APIs, and what of them is refused."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from dpojax.models.functional import as_function

INPUT = jnp.arange(6.0).reshape(2, 3)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.double(x))

    def double(self, x: jax.Array) -> jax.Array:
        return 2 * self.first(x)


class LinenModel(linen.Module):
    def setup(self):
        spread = linen.with_partitioning(linen.initializers.normal(1.0), (None, "x"))
        self.first = linen.Dense(4, kernel_init=spread)
        self.last = linen.Dense(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.double(x))

    def double(self, x: jax.Array) -> jax.Array:
        return 2 * self.first(x)


def bound() -> LinenModel:
    model = LinenModel()
    return model.bind(model.init(jax.random.key(0), INPUT))


@pytest.mark.parametrize("make", [lambda: NnxModel(nnx.Rngs(0)), bound])
def test_a_function_computes_what_its_module_does(make: Callable[[], Any]):
    module = make()
    apply, params = as_function(module)
    np.testing.assert_allclose(jax.jit(apply)(params, INPUT), module(INPUT), rtol=1e-6)
    double, _ = as_function(module, type(module).double)
    np.testing.assert_allclose(double(params, INPUT), module.double(INPUT), rtol=1e-6)


@pytest.mark.parametrize("make", [lambda: NnxModel(nnx.Rngs(0)), bound])
def test_parameters_are_nested_dicts_of_arrays(make: Callable[[], Any]):
    params = as_function(make())[1]
    assert type(params) is dict and params.keys() == {"first", "last"}
    for layer in params.values():
        assert type(layer) is dict and layer.keys() == {"kernel", "bias"}
        assert all(isinstance(leaf, jax.Array) for leaf in layer.values())


@pytest.mark.parametrize("make", [lambda: NnxModel(nnx.Rngs(0)), bound])
def test_the_parameters_given_are_the_ones_used(make: Callable[[], Any]):
    apply, params = as_function(make())
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert not apply(zeros, INPUT).any() and apply(params, INPUT).any()


def test_abstract_modules_have_abstract_parameters():
    shapes = {"first": {"kernel": (3, 4), "bias": (4,)}}
    abstract = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    model = LinenModel()
    variables = jax.eval_shape(model.init, jax.random.key(0), INPUT)
    for module in (abstract, model.bind(variables)):
        params = as_function(module)[1]
        found = {name: leaf.shape for name, leaf in params["first"].items()}
        assert found == shapes["first"]


class NnxNormed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.BatchNorm(use_running_average=True)(x)


def test_a_module_with_other_state_than_parameters_is_refused():
    with pytest.raises(ValueError, match="NnxNormed holds BatchStat, Rng.* beside par"):
        as_function(NnxNormed(nnx.Rngs(0)))
    model = LinenNormed()
    variables = model.init(jax.random.key(0), INPUT)
    with pytest.raises(ValueError, match="LinenNormed holds batch_stats beside param"):
        as_function(model.bind(variables))


def test_a_linen_module_without_its_variables_is_refused():
    with pytest.raises(ValueError, match="LinenModel has no variables yet; give"):
        as_function(LinenModel())


def test_a_function_is_refused_since_it_is_one_already():
    with pytest.raises(ValueError, match="A function is no Flax module"):
        as_function(lambda params, batch: batch)
