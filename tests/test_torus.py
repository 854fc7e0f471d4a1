"""Exchanges along one dimension of a torus after another, on four CPU devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpojax.kernel_exchange import KernelExchange, make_kernel_exchange
from dpojax.models.linear import ALONE, kernel_gradient, multiply
from dpojax.sharding import TOKENS, make_mesh
from dpojax.torus import Line, along_dimensions, make_line

BENT = Line("fsdp", ([[0, 2], [1, 3]], [[0, 1], [2, 3]]))
STRAIGHT = Line("fsdp", ([[0, 1]],))


def test_devices_of_a_box_are_grouped_along_each_of_its_dimensions():
    box = [(x, y, 0) for x in range(2) for y in (1, 0, 2)]
    assert along_dimensions(box) == (
        [[0, 3], [1, 4], [2, 5]],
        [[0, 1, 2], [3, 4, 5]],
    )
    assert along_dimensions(box[:3]) == ([[0, 1, 2]],)


def test_devices_in_a_ring_or_of_no_torus_are_not_taken_apart():
    assert along_dimensions([(0, 0), (1, 0), (1, 1), (0, 1)]) == (None,)
    assert make_line(make_mesh(fsdp=4), "fsdp") == Line("fsdp", (None,))
    assert not Line("fsdp").is_box and BENT.is_box


@pytest.mark.parametrize("line", [BENT, Line("fsdp")])
@pytest.mark.parametrize("dimension", [0, 1])
def test_phases_scatter_and_gather_what_a_single_exchange_does(
    line: Line, dimension: int
):
    mesh = make_mesh(data=1, fsdp=4)
    whole = jnp.arange(4 * 8 * 8.0).reshape(4, 8, 8)
    spec = P(*(None,) * dimension, "fsdp")

    @partial(
        jax.shard_map, mesh=mesh, in_specs=P("fsdp"), out_specs=(spec, P()),
        check_vma=False,
    )  # fmt: skip
    def exchange(own: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = line.scatter(own[0], dimension)
        return part, line.gather(part, dimension)

    for found in exchange(whole):
        np.testing.assert_array_equal(found, whole.sum(0))


@pytest.mark.parametrize("path", ["attention/query", "mlp/down"])
@pytest.mark.parametrize(
    ("mesh", "line"),
    [
        (make_mesh(data=1, fsdp=4), BENT),
        (make_mesh(data=2, fsdp=2), STRAIGHT),
        (make_mesh(data=1, fsdp=2, tensor=2), STRAIGHT),
        (make_mesh(data=1, fsdp=2, context=2), STRAIGHT),
    ],
)
def test_a_projection_and_its_gradients_are_those_of_one_device(
    path: str, mesh: Mesh, line: Line
):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(4, 6, 16)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    exchange = make_kernel_exchange(mesh, line, kernel_gradient)
    placed = jax.device_put(hidden, NamedSharding(mesh, TOKENS))
    found, found_gradients = of_square(path, exchange, placed, kernel)
    expected, gradients = of_square(path, ALONE, hidden, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for one, other in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_compiled_gradient_is_scattered_along_one_dimension_after_another():
    mesh = make_mesh(data=1, fsdp=4)
    exchange = make_kernel_exchange(mesh, BENT, kernel_gradient)
    hidden = jax.ShapeDtypeStruct((4, 6, 16), jnp.float32)
    slope = jax.ShapeDtypeStruct((4, 6, 8), jnp.float32)
    summed = jax.jit(partial(exchange.gradient, "mlp/up")).lower(hidden, slope)
    assert summed.as_text().count("reduce_scatter") == 2


def test_a_kernel_that_devices_do_not_divide_is_left_to_the_compiler():
    mesh = make_mesh(data=1, fsdp=4)
    exchange = make_kernel_exchange(mesh, BENT, kernel_gradient)
    hidden, kernel = jnp.ones((4, 2, 6)), jnp.ones((6, 8))
    assert exchange.whole("mlp/up", kernel) is kernel
    found = exchange.gradient("mlp/up", hidden, jnp.ones((4, 2, 8)))
    np.testing.assert_array_equal(found, jnp.full((6, 8), 8.0))


def of_square(
    path: str, exchange: KernelExchange, hidden: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Half the sum of squares of a projection, and its gradients."""

    def half_square(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(multiply(path, exchange, hidden, kernel) ** 2)

    take = jax.jit(jax.value_and_grad(half_square, argnums=(0, 1)))
    return take(hidden, kernel)
