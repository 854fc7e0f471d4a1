"""Statistics of the softmax, tile by tile: against the whole softmax, on one device
and on meshes. Builds no model: hidden states and matrices are random numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.sharding import make_mesh
from dpojax.spread import ALONE, Spread
from dpojax.vocabulary.forward import TokenStatistics
from dpojax.vocabulary.statistics import token_statistics
from dpojax.vocabulary.tiles import How, Operand, Wanted

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 11, 8, 36
EVERY: frozenset[Wanted] = frozenset({"log_sum_squares", "entropy", "top1", "kl"})


def operand(seed: int, bias: bool = False, cap: float | None = None) -> Operand:
    random = np.random.default_rng(seed)

    def fill(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    added = fill(VOCABULARY) if bias else None
    return Operand(fill(ROWS, LENGTH, WIDTH), fill(VOCABULARY, WIDTH), added, cap)


def rows() -> tuple[jax.Array, jax.Array]:
    """Labels, and which of them count: of the third row none."""
    random = np.random.default_rng(9)
    labels = random.integers(0, VOCABULARY, (ROWS, LENGTH))
    scored = random.random((ROWS, LENGTH)) < 0.6
    scored[2] = False
    return jnp.asarray(labels), jnp.asarray(scored)


def logits(operand: Operand) -> jax.Array:
    values = operand.hidden @ operand.matrix.T
    values = values if operand.bias is None else values + operand.bias
    cap = operand.cap
    return values if cap is None else cap * jnp.tanh(values / cap)


def plain(this: Operand, other: Operand) -> TokenStatistics:
    """The same from all logits at once."""
    labels, scored = rows()
    log_p, log_q = (jax.nn.log_softmax(logits(one)) for one in (this, other))
    p, q = jnp.exp(log_p), jnp.exp(log_q)

    def of_labels(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, labels[..., None], -1)[..., 0]

    found = TokenStatistics(
        log_prob=of_labels(log_p),
        log_sum_squares=jnp.log(jnp.sum(p**2, -1)),
        entropy=-jnp.sum(p * log_p, -1),
        top1=(jnp.argmax(log_p, -1) == labels).astype(jnp.float32),
        kl=jnp.sum(q * (log_q - log_p), -1),
        other_log_prob=of_labels(log_q),
    )
    return jax.tree.map(lambda values: jnp.where(scored, values, 0.0), found)


def tiled(how: How) -> Callable[[Operand, Operand | None], TokenStatistics]:
    def function(this: Operand, other: Operand | None) -> TokenStatistics:
        labels, scored = rows()
        return token_statistics(how, this, other, labels, scored)

    return function


def compare(found: Any, expected: Any) -> None:
    def close(one: jax.Array, other: jax.Array) -> None:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)

    jax.tree.map(close, found, expected)


def weighted(function: Callable, this: Operand, other: Operand | None) -> jax.Array:
    """A sum of everything that has a gradient, each position with its own weight."""
    found = function(this, other)
    weight = jnp.asarray(np.random.default_rng(5).normal(size=(ROWS, LENGTH)))
    kl = 0.0 if found.kl is None else jnp.sum(weight[::-1] * found.kl)
    return jnp.sum(weight * found.log_prob) + kl


MESHES = {"one": None, "fsdp": (1, 4, 1), "tensor": (1, 2, 2), "data": (2, 1, 2)}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("bias", "cap"), [(False, None), (True, 3.0)])
def test_tiles_on_any_mesh_give_what_the_whole_softmax_does(
    mesh: str, bias: bool, cap: float | None
):
    """Values and gradients; 36 tokens in tiles of 7, 44 positions in chunks of 5."""
    this, other = operand(0, bias, cap), operand(1, bias, cap)
    spread = ALONE if MESHES[mesh] is None else Spread(make_mesh(*MESHES[mesh]))
    ours = tiled(How(EVERY, 5, spread, tile=7))
    compare(jax.jit(ours)(this, other), jax.jit(plain)(this, other))

    def gradient(function: Callable) -> Operand:
        def total(hidden: Any, matrix: Any, bias: Any) -> jax.Array:
            return weighted(function, Operand(hidden, matrix, bias, cap), other)

        parts = (0, 1, 2) if bias else (0, 1)
        return jax.jit(jax.grad(total, parts))(*this[:3])

    compare(gradient(ours), gradient(plain))
    # Without KL, the forward pass keeps the gradient by the hidden states.
    ours = tiled(How(frozenset(), 5, spread, tile=7))
    compare(gradient(ours), gradient(lambda *both: plain(*both)._replace(kl=None)))


@pytest.mark.parametrize("mesh", ["one", "tensor"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_frozen_matrix_gives_the_same_gradient_with_one_product_less(
    mesh: str, cap: float | None
):
    spread = ALONE if MESHES[mesh] is None else Spread(make_mesh(*MESHES[mesh]))
    this = operand(2, True, cap)
    ours = tiled(How(frozenset(), 44, spread))

    def total(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        return weighted(ours, this._replace(hidden=hidden, matrix=matrix), None)

    arrays = this.hidden, this.matrix
    frozen, trained = (jax.jit(jax.grad(total, parts)) for parts in (0, (0, 1)))
    compare(frozen(*arrays), trained(*arrays)[0])

    def num_products(function: Callable) -> int:
        return str(jax.make_jaxpr(function)(*arrays)).count("dot_general")

    assert (num_products(frozen), num_products(trained)) == (2, 4)


def test_gradients_have_gradients():
    """Forward over reverse: the product of the Hessian and a vector."""
    this, along = operand(3), operand(4).hidden
    ours = tiled(How(frozenset(), 16, ALONE, tile=16))

    def slope(function: Callable) -> Callable[[jax.Array], jax.Array]:
        def total(hidden: jax.Array) -> jax.Array:
            return weighted(function, this._replace(hidden=hidden), None)

        return jax.grad(total)

    def whole(this: Operand, _: None) -> TokenStatistics:
        return plain(this, this)._replace(kl=None)

    found = jax.jvp(slope(ours), (this.hidden,), (along,))[1]
    compare(found, jax.jvp(slope(whole), (this.hidden,), (along,))[1])


def test_temporaries_do_not_grow_with_the_vocabulary():
    """But for the matrix's own gradient, which is an output."""

    def temporaries(vocabulary: int) -> int:
        how = How(frozenset(), 16, ALONE, tile=64)

        def total(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
            return jnp.sum(tiled(how)(Operand(hidden, matrix), None).log_prob)

        hidden = jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32)
        matrix = jax.ShapeDtypeStruct((vocabulary, WIDTH), jnp.float32)
        gradient = jax.jit(jax.grad(total, (0, 1)))
        memory = gradient.lower(hidden, matrix).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(4096) < 1.1 * temporaries(512)
