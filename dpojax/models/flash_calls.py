"""How the kernels of flash attention are called: grids, and who gets which block.

A grid is heads by the pairs of a plan, whose number is known when it runs: no step is
spent on what the mask empties. A block is copied when its index changes, so that one at
rest is copied once. This file knows neither what the kernels compute with the blocks
nor what a caller does with their gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from dpojax.models.flash_kernels import (
    LANES,
    Ref,
    Settings,
    forward_kernel,
    key_kernel,
    query_kernel,
)
from dpojax.models.flash_plan import Facts, Pairs, Plan

Heads = Float[Array, "rows heads length dimension"]
KeyHeads = Float[Array, "rows key_heads length dimension"]
Statistic = Float[Array, "rows heads 1 length"]


class Inputs(NamedTuple):
    """What all kernels read."""

    query: Heads
    key: KeyHeads  # each head serves ``heads / key_heads`` heads of queries
    value: KeyHeads
    facts: Facts


class Slopes(NamedTuple):
    """What the kernels of the backward pass read beside that."""

    attended: Heads  # the gradient to what the forward pass returned
    logsumexp: Statistic  # of the forward pass
    delta: Statistic  # of each query, the product of what it got and its gradient


class _Step(NamedTuple):
    """Where a step of a grid stands."""

    row: Array
    head: Array
    key_head: Array
    query_block: Array
    key_block: Array


class _Specs(NamedTuple):
    """How each kind of array is cut into blocks, and which one a step takes."""

    query: pl.BlockSpec
    key: pl.BlockSpec
    statistic: pl.BlockSpec
    query_facts: pl.BlockSpec
    key_facts: pl.BlockSpec


# JAX 0.10 drops the call of a jitted function whose results a rematerialised layer does
# not need again; that of a kernel it would leave to XLA to drop.
@partial(jax.jit, static_argnums=0)
def forward(settings: Settings, inputs: Inputs, plan: Plan) -> tuple[Heads, Statistic]:
    """The attended values, and of each query the logarithm of its softmax's sum.

    Args:
      settings: what the kernel is compiled for.
      inputs: queries, keys, values and what the mask needs of their tokens.
      plan: the pairs of blocks to visit, queries at rest.
    """
    query, facts, block = inputs.query, inputs.facts, settings.block
    num_rows, num_heads, length, dimension = query.shape
    specs = _make_specs(settings, inputs, _locate_by_query(inputs))
    statistic = jax.ShapeDtypeStruct((num_rows, num_heads, 1, length), jnp.float32)
    return _call(
        forward_kernel,
        settings,
        plan,
        grid=(num_heads, plan.count),
        in_specs=(
            specs.query,
            specs.key,
            specs.key,
            specs.query_facts,
            specs.key_facts,
        ),
        out_specs=(specs.query, specs.statistic),
        out_shape=(jax.ShapeDtypeStruct(query.shape, query.dtype), statistic),
        scratch_shapes=(
            pltpu.VMEM((facts.query.shape[1], block, LANES), jnp.int32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, dimension), jnp.float32),
        ),
    )(*plan.pairs, inputs.query, inputs.key, inputs.value, *facts)


def backward_to_query(
    settings: Settings, inputs: Inputs, slopes: Slopes, plan: Plan
) -> Heads:
    """The gradient to the queries; the plan has queries at rest."""
    query, facts, block = inputs.query, inputs.facts, settings.block
    specs = _make_specs(settings, inputs, _locate_by_query(inputs))
    return _call(
        query_kernel,
        settings,
        plan,
        grid=(query.shape[1], plan.count),
        in_specs=_backward_specs(specs),
        out_specs=specs.query,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        scratch_shapes=(
            pltpu.VMEM((facts.query.shape[1], block, LANES), jnp.int32),
            pltpu.VMEM((2, block, LANES), jnp.float32),
            pltpu.VMEM((block, query.shape[3]), jnp.float32),
        ),
    )(*plan.pairs, inputs.query, inputs.key, inputs.value, *slopes, *facts)


def backward_to_key(
    settings: Settings, inputs: Inputs, slopes: Slopes, plan: Plan
) -> tuple[KeyHeads, KeyHeads]:
    """The gradients to keys and values; the plan has keys at rest."""
    key, facts, block = inputs.key, inputs.facts, settings.block
    specs = _make_specs(settings, inputs, _locate_by_key(inputs))
    gradient = jax.ShapeDtypeStruct(key.shape, key.dtype)
    return _call(
        key_kernel,
        settings,
        plan,
        grid=(key.shape[1], plan.count, _group(inputs)),
        in_specs=_backward_specs(specs),
        out_specs=(specs.key, specs.key),
        out_shape=(gradient, gradient),
        scratch_shapes=(
            pltpu.VMEM((facts.key.shape[1], block, LANES), jnp.int32),
            pltpu.VMEM((block, key.shape[3]), jnp.float32),
            pltpu.VMEM((block, key.shape[3]), jnp.float32),
        ),
    )(*plan.pairs, inputs.query, inputs.key, inputs.value, *slopes, *facts)


def _group(inputs: Inputs) -> int:
    return inputs.query.shape[1] // inputs.key.shape[1]


def _locate_by_query(inputs: Inputs) -> Callable[..., _Step]:
    def locate(head: Array, item: Array, *pairs: Ref) -> _Step:
        at, key_head = Pairs(*pairs), jax.lax.div(head, _group(inputs))
        return _Step(at.row[item], head, key_head, at.resting[item], at.passing[item])

    return locate


def _locate_by_key(inputs: Inputs) -> Callable[..., _Step]:
    def locate(key_head: Array, item: Array, member: Array, *pairs: Ref) -> _Step:
        at, head = Pairs(*pairs), key_head * _group(inputs) + member
        return _Step(at.row[item], head, key_head, at.passing[item], at.resting[item])

    return locate


def _make_specs(
    settings: Settings, inputs: Inputs, locate: Callable[..., _Step]
) -> _Specs:
    block, facts = settings.block, inputs.facts
    heads = (None, None, block, inputs.query.shape[3])

    def spec(
        shape: tuple[int | None, ...], index: Callable[[_Step], tuple]
    ) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *step: index(locate(*step)))

    return _Specs(
        query=spec(heads, lambda at: (at.row, at.head, at.query_block, 0)),
        key=spec(heads, lambda at: (at.row, at.key_head, at.key_block, 0)),
        statistic=spec(
            (None, None, 1, block), lambda at: (at.row, at.head, 0, at.query_block)
        ),
        query_facts=spec(
            (None, facts.query.shape[1], block), lambda at: (at.row, 0, at.query_block)
        ),
        key_facts=spec(
            (None, facts.key.shape[1], block), lambda at: (at.row, 0, at.key_block)
        ),
    )


def _backward_specs(specs: _Specs) -> tuple[pl.BlockSpec, ...]:
    """Of queries, keys, values, their slope, logsumexp, delta and facts."""
    heads = specs.query, specs.key, specs.key, specs.query
    statistics = specs.statistic, specs.statistic
    return *heads, *statistics, specs.query_facts, specs.key_facts


def _call(
    kernel: Callable[..., None],
    settings: Settings,
    plan: Plan,
    *,
    grid: tuple,
    in_specs: tuple,
    out_specs: Any,
    out_shape: Any,
    scratch_shapes: tuple,
) -> Callable[..., Any]:
    """A kernel on every step of a grid; plans are read before the blocks are."""
    return pl.pallas_call(
        partial(kernel, settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan.pairs),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, *[pltpu.ARBITRARY] * (len(grid) - 1))
        ),
        interpret=settings.interpret,
        name=f"flash_{kernel.__name__}",
    )
