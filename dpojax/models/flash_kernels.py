"""The Pallas kernels of flash attention: forward, backward to queries, and to keys.

Each visits the pairs of blocks that a plan lists: one block rests in the chip's memory
with its accumulators while others are brought past it, and scores exist for one pair at
a time. What belongs to the rows of such a matrix is held as columns, the same number in
all lanes of a register; what belongs to its columns is held as rows. This file knows no
derivative rule, no ragged length and no mesh.

References:
  Dao 2023, "FlashAttention-2", algorithms 1 and 2; `logsumexp` and `delta` are its L
  and D.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from dpojax.models.flash_plan import PARTLY, WHOLLY, Facts, Pairs, Plan

LANES = 128
# So far apart that the exponential of an unseen score is 0 even where nothing is seen
# and the maximum is the lowest; both far below any score.
_UNSEEN, _LOWEST = -2e30, -1e30

Heads = Float[Array, "rows heads length dimension"]
KeyHeads = Float[Array, "rows key_heads length dimension"]
Statistic = Float[Array, "rows heads 1 length"]
Ref = Any  # of an array in the chip's memory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a kernel is compiled for."""

    scale: float  # multiplies the scores
    cap: float | None  # scores become ``cap * tanh(score / cap)``
    block: int  # tokens of a block; divides the length
    interpret: bool  # XLA computes what the kernel would, on any device


class _Step(NamedTuple):
    """Where a step of a kernel's grid stands."""

    row: Array
    head: Array
    key_head: Array
    query_block: Array
    key_block: Array


class _Specs(NamedTuple):
    """How arrays are cut into blocks, and which one a step takes."""

    query: pl.BlockSpec
    key: pl.BlockSpec
    statistic: pl.BlockSpec
    query_facts: pl.BlockSpec
    key_facts: pl.BlockSpec


def forward(
    settings: Settings,
    query: Heads,
    key: KeyHeads,
    value: KeyHeads,
    facts: Facts,
    plan: Plan,
) -> tuple[Heads, Statistic]:
    """The attended values, and of each query the logarithm of its softmax's sum.

    Args:
      settings: what the kernel is compiled for.
      query: queries.
      key: keys; each head of them serves ``heads / key_heads`` heads of queries.
      value: values.
      facts: what the mask needs of each token.
      plan: the pairs of blocks to visit, queries at rest.
    """
    num_rows, num_heads, length, dimension = query.shape
    group, block = num_heads // key.shape[1], settings.block

    def locate(head: Array, item: Array, *pairs: Ref) -> _Step:
        at = Pairs(*pairs)
        blocks = at.resting[item], at.passing[item]
        return _Step(at.row[item], head, head // group, *blocks)

    specs = _make_specs(block, dimension, facts, locate)
    statistic = jax.ShapeDtypeStruct((num_rows, num_heads, 1, length), jnp.float32)
    return _call(
        partial(_forward_kernel, settings),
        settings,
        plan,
        grid=(num_heads, plan.count),
        in_specs=(specs.query, *[specs.key] * 2, specs.query_facts, specs.key_facts),
        out_specs=(specs.query, specs.statistic),
        out_shape=(jax.ShapeDtypeStruct(query.shape, query.dtype), statistic),
        scratch_shapes=(
            pltpu.VMEM((facts.query.shape[1], block, LANES), jnp.int32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, dimension), jnp.float32),
        ),
    )(*plan.pairs, query, key, value, *facts)


def backward_to_query(
    settings: Settings,
    query: Heads,
    key: KeyHeads,
    value: KeyHeads,
    facts: Facts,
    plan: Plan,
    slope: Heads,
    logsumexp: Statistic,
    delta: Statistic,
) -> Heads:
    """The gradient to the queries.

    Args:
      settings: as for `forward`, as are the arguments up to `plan`.
      query: queries.
      key: keys.
      value: values.
      facts: what the mask needs of each token.
      plan: the pairs of blocks to visit, queries at rest.
      slope: the gradient to what `forward` returned.
      logsumexp: of the forward pass.
      delta: of each query, the inner product of what it got and its slope.
    """
    num_heads, dimension = query.shape[1], query.shape[3]
    group, block = num_heads // key.shape[1], settings.block

    def locate(head: Array, item: Array, *pairs: Ref) -> _Step:
        at = Pairs(*pairs)
        blocks = at.resting[item], at.passing[item]
        return _Step(at.row[item], head, head // group, *blocks)

    specs = _make_specs(block, dimension, facts, locate)
    return _call(
        partial(_query_kernel, settings),
        settings,
        plan,
        grid=(num_heads, plan.count),
        in_specs=_backward_inputs(specs),
        out_specs=specs.query,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        scratch_shapes=(
            pltpu.VMEM((facts.query.shape[1], block, LANES), jnp.int32),
            pltpu.VMEM((2, block, LANES), jnp.float32),
            pltpu.VMEM((block, dimension), jnp.float32),
        ),
    )(*plan.pairs, query, key, value, slope, logsumexp, delta, *facts)


def backward_to_key(
    settings: Settings,
    query: Heads,
    key: KeyHeads,
    value: KeyHeads,
    facts: Facts,
    plan: Plan,
    slope: Heads,
    logsumexp: Statistic,
    delta: Statistic,
) -> tuple[KeyHeads, KeyHeads]:
    """The gradients to keys and values; as `backward_to_query`, with keys at rest."""
    num_key_heads, dimension = key.shape[1], key.shape[3]
    group, block = query.shape[1] // num_key_heads, settings.block

    def locate(key_head: Array, item: Array, member: Array, *pairs: Ref) -> _Step:
        at = Pairs(*pairs)
        blocks = at.passing[item], at.resting[item]
        return _Step(at.row[item], key_head * group + member, key_head, *blocks)

    specs = _make_specs(block, dimension, facts, locate)
    gradient = jax.ShapeDtypeStruct(key.shape, key.dtype)
    return _call(
        partial(_key_kernel, settings),
        settings,
        plan,
        grid=(num_key_heads, plan.count, group),
        in_specs=_backward_inputs(specs),
        out_specs=(specs.key, specs.key),
        out_shape=(gradient, gradient),
        scratch_shapes=(
            pltpu.VMEM((facts.key.shape[1], block, LANES), jnp.int32),
            pltpu.VMEM((block, dimension), jnp.float32),
            pltpu.VMEM((block, dimension), jnp.float32),
        ),
    )(*plan.pairs, query, key, value, slope, logsumexp, delta, *facts)


def _make_specs(
    block: int, dimension: int, facts: Facts, locate: Callable[..., _Step]
) -> _Specs:
    def spec(
        shape: tuple[int | None, ...], index: Callable[[_Step], tuple]
    ) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *step: index(locate(*step)))

    heads = (None, None, block, dimension)
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


def _backward_inputs(specs: _Specs) -> tuple[pl.BlockSpec, ...]:
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
    """The kernel on every step of a grid of heads, pairs and perhaps more heads."""
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan.pairs),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *["arbitrary"] * (len(grid) - 1))
        ),
        interpret=settings.interpret,
        name=kernel.func.__name__.strip("_") if isinstance(kernel, partial) else None,
    )


def _forward_kernel(settings: Settings, *refs: Ref) -> None:
    pairs, refs = Pairs(*refs[:6]), refs[6:]
    query, key, value, query_facts, key_facts, out, logsumexp, *scratch = refs
    columns, highest, total, attended = scratch
    item, block = pl.program_id(1), settings.block
    dimension = query.shape[1]

    @pl.when(pairs.opens[item] == 1)
    def _() -> None:
        _fill_columns(columns, query_facts[...])
        highest[...] = jnp.full_like(highest, _LOWEST)
        total[...] = jnp.zeros_like(total)
        attended[...] = jnp.zeros_like(attended)

    def visit(hide: Callable[[Array], Array]) -> None:
        scores = hide(_scores(settings, query[...], key[...]))
        new = jnp.maximum(highest[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - _across(new, block))
        decay = jnp.exp(highest[...] - new)
        highest[...] = new
        total[...] = decay * total[...] + jnp.sum(weights, axis=1, keepdims=True)
        product = _dot(weights.astype(value.dtype), value[...], (1, 0))
        attended[...] = attended[...] * _across(decay, dimension) + product

    def seen() -> Array:
        distance = (pairs.resting[item] - pairs.passing[item]) * block
        of_queries = [_across(columns[i], block) for i in range(columns.shape[0])]
        return _seen(of_queries, _rows(key_facts), distance, query_axis=0)

    _visit_as_planned(pairs.visible[item], visit, seen)

    @pl.when(pairs.closes[item] == 1)
    def _() -> None:
        # Padding sees nothing: it gets 0.
        sums = jnp.where(total[...] == 0, 1.0, total[...])
        out[...] = (attended[...] / _across(sums, dimension)).astype(out.dtype)
        logsumexp[...] = (highest[...] + jnp.log(sums)).T[:1]


def _query_kernel(settings: Settings, *refs: Ref) -> None:
    pairs, refs = Pairs(*refs[:6]), refs[6:]
    query, key, value, slope, logsumexp, delta, query_facts, key_facts, *rest = refs
    gradient, columns, statistics, total = rest
    item, block = pl.program_id(1), settings.block

    @pl.when(pairs.opens[item] == 1)
    def _() -> None:
        _fill_columns(columns, query_facts[...])
        _fill_columns(statistics, jnp.concatenate([logsumexp[...], delta[...]]))
        total[...] = jnp.zeros_like(total)

    def visit(hide: Callable[[Array], Array]) -> None:
        scores = _scores(settings, query[...], key[...])
        weights = jnp.exp(hide(scores) - _across(statistics[0], block))
        to_weights = _dot(slope[...], value[...], (1, 1))
        to_scores = weights * (to_weights - _across(statistics[1], block))
        to_scores *= _slope_of_cap(settings, scores)
        total[...] += _dot(to_scores.astype(key.dtype), key[...], (1, 0))

    def seen() -> Array:
        distance = (pairs.resting[item] - pairs.passing[item]) * block
        of_queries = [_across(columns[i], block) for i in range(columns.shape[0])]
        return _seen(of_queries, _rows(key_facts), distance, query_axis=0)

    _visit_as_planned(pairs.visible[item], visit, seen)

    @pl.when(pairs.closes[item] == 1)
    def _() -> None:
        gradient[...] = (settings.scale * total[...]).astype(gradient.dtype)


def _key_kernel(settings: Settings, *refs: Ref) -> None:
    pairs, refs = Pairs(*refs[:6]), refs[6:]
    query, key, value, slope, logsumexp, delta, query_facts, key_facts, *rest = refs
    to_key, to_value, columns, key_total, value_total = rest
    item, member, block = pl.program_id(1), pl.program_id(2), settings.block

    @pl.when((pairs.opens[item] == 1) & (member == 0))
    def _() -> None:
        _fill_columns(columns, key_facts[...])
        key_total[...] = jnp.zeros_like(key_total)
        value_total[...] = jnp.zeros_like(value_total)

    def visit(hide: Callable[[Array], Array]) -> None:
        scores = _scores(settings, key[...], query[...])
        weights = jnp.exp(hide(scores) - logsumexp[...])
        value_total[...] += _dot(weights.astype(slope.dtype), slope[...], (1, 0))
        to_weights = _dot(value[...], slope[...], (1, 1))
        to_scores = weights * (to_weights - delta[...])
        to_scores *= _slope_of_cap(settings, scores)
        key_total[...] += _dot(to_scores.astype(query.dtype), query[...], (1, 0))

    def seen() -> Array:
        distance = (pairs.passing[item] - pairs.resting[item]) * block
        of_keys = [_across(columns[i], block) for i in range(columns.shape[0])]
        return _seen(_rows(query_facts), of_keys, distance, query_axis=1)

    _visit_as_planned(pairs.visible[item], visit, seen)

    @pl.when((pairs.closes[item] == 1) & (member == pl.num_programs(2) - 1))
    def _() -> None:
        to_key[...] = (settings.scale * key_total[...]).astype(to_key.dtype)
        to_value[...] = value_total[...].astype(to_value.dtype)


def _visit_as_planned(
    visible: Array,
    visit: Callable[[Callable[[Array], Array]], None],
    seen: Callable[[], Array],
) -> None:
    """Visits a pair of blocks: without a mask where none is needed, or not at all."""

    @pl.when(visible == WHOLLY)
    def _() -> None:
        visit(lambda scores: scores)

    @pl.when(visible == PARTLY)
    def _() -> None:
        visit(lambda scores: jnp.where(seen(), scores, _UNSEEN))


def _seen(
    of_queries: Sequence[Array],
    of_keys: Sequence[Array],
    distance: Array,
    *,
    query_axis: int,
) -> Array:
    """The mask of a pair of blocks, from facts along the matrix's two axes.

    `distance` is that of the first query from the first key in the row.
    """
    own, prompt, *oldest = of_queries
    code, *position = of_keys
    shape = jnp.broadcast_shapes(own.shape, code.shape)
    query_index = jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    key_index = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    seen = (key_index - query_index) <= distance
    seen &= (code == own) | (code == prompt)
    for first, place in zip(oldest, position, strict=True):  # only under a window
        seen &= place >= first
    return seen


def _scores(settings: Settings, one: Array, other: Array) -> Array:
    scores = _dot(one, other, (1, 1)) * settings.scale
    if settings.cap is None:
        return scores
    return settings.cap * jnp.tanh(scores / settings.cap)


def _slope_of_cap(settings: Settings, scores: Array) -> Array | float:
    return 1.0 if settings.cap is None else 1 - jnp.square(scores / settings.cap)


def _dot(one: Array, other: Array, axes: tuple[int, int]) -> Array:
    """The product over one axis of each, summed in float32."""
    exact = one.dtype == jnp.float32
    return jax.lax.dot_general(
        one,
        other,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _rows(facts: Ref) -> list[Array]:
    return [facts[i : i + 1] for i in range(facts.shape[0])]


def _fill_columns(columns: Ref, rows: Array) -> None:
    """Writes each row as a column, the same in all lanes."""
    for i in range(rows.shape[0]):
        columns[i] = jnp.broadcast_to(rows[i : i + 1], (LANES, rows.shape[1])).T


def _across(column: Array, width: int) -> Array:
    """A column for a matrix of so many columns."""
    return jnp.concatenate([column] * -(-width // LANES), axis=1)[:, :width]
