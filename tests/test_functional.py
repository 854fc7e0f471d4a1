"""Flax modules of both kinds as functions of their parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core, linen, nnx

from dpojax.models.functional import as_function

INPUT = jnp.array([[1.0, 2.0, 3.0]])


class OfNnx(nnx.Module):
    """Two layers, one of them in a list."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.others = nnx.List([nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.others[0](self.first(x))

    def half(self, x: jax.Array) -> jax.Array:
        return self.first(x)


class OfLinen(linen.Module):
    """The same, the names of the first kernel's axes beside it."""

    def setup(self):
        kernel = linen.with_partitioning(linen.initializers.ones, ("in", "out"))
        self.first = linen.Dense(4, kernel_init=kernel)
        self.second = linen.Dense(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x))

    def half(self, x: jax.Array) -> jax.Array:
        return self.first(x)


def bound(module: linen.Module) -> linen.Module:
    return module.bind(module.init(jax.random.key(0), INPUT))


MAKERS = [lambda: OfNnx(nnx.Rngs(0)), lambda: bound(OfLinen())]


@pytest.mark.parametrize("make", MAKERS, ids=["nnx", "linen"])
def test_the_function_of_its_parameters_is_the_module(make: Callable):
    module = make()
    apply, params = as_function(module)
    np.testing.assert_allclose(jax.jit(apply)(params, INPUT), module(INPUT), rtol=1e-6)
    half, _ = as_function(module, type(module).half)
    np.testing.assert_allclose(half(params, INPUT), module.half(INPUT), rtol=1e-6)


@pytest.mark.parametrize("make", MAKERS, ids=["nnx", "linen"])
def test_parameters_are_nested_dicts_of_arrays(make: Callable):
    apply, params = as_function(make())
    paths = jax.tree.leaves_with_path(params)
    assert len(paths) == 4
    for path, leaf in paths:
        assert isinstance(leaf, jax.Array)
        assert all(isinstance(key, jax.tree_util.DictKey) for key in path)
    assert type(params) is dict
    gradient = jax.grad(lambda params: apply(params, INPUT).sum())(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


def test_an_abstract_linen_module_has_shapes_for_parameters():
    module = OfLinen()
    shapes = jax.eval_shape(module.init, jax.random.key(0), INPUT)
    apply, params = as_function(module.bind(shapes))
    assert params["first"]["kernel"].shape == (3, 4)
    assert jax.eval_shape(apply, params, INPUT).shape == (1, 2)


def test_frozen_variables_become_plain_dicts():
    module = linen.Dense(2)
    frozen = core.freeze(module.init(jax.random.key(0), INPUT))
    _, params = as_function(module.bind(frozen))
    assert type(params) is dict


def test_a_linen_module_without_variables_is_refused():
    with pytest.raises(ValueError, match="Linen module OfLinen has no variables; give"):
        as_function(OfLinen())


class Noisy(nnx.Module):
    """A layer that draws, and one that counts."""

    def __init__(self, rngs: nnx.Rngs):
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.drop(x))


def test_other_state_than_parameters_is_refused():
    with pytest.raises(ValueError, match="Noisy holds BatchStat, RngCount, RngKey bes"):
        as_function(Noisy(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="BatchNorm holds batch_stats besides param"):
        as_function(bound(linen.BatchNorm(use_running_average=True)))
