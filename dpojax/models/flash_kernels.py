"""The Pallas kernels of flash attention: forward, backward to queries, and to keys.

Each visits the pairs of blocks that a plan lists: one block rests in the chip's memory
with its accumulators while others are brought past it, and scores exist for one pair at
a time. What belongs to the rows of such a matrix is held as columns, the same number in
all lanes of a register; what belongs to its columns is held as rows. This file knows
only blocks: which they are is the caller's choice.

References:
  Dao 2023, "FlashAttention-2", algorithms 1 and 2; `logsumexp` and `delta` are its L
  and D.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from dpojax.models.flash_plan import PARTLY, WHOLLY, Pairs

LANES = 128
# So far apart that the exponential of an unseen score is 0 even where nothing is seen
# and the maximum is the lowest; both far below any score.
_UNSEEN, _LOWEST = -2e30, -1e30

_PLANNED = len(Pairs._fields)
Ref = Any  # of an array in the chip's memory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a kernel is compiled for."""

    scale: float  # multiplies the scores
    cap: float | None  # scores become ``cap * tanh(score / cap)``
    block: int  # tokens of a block; divides the length
    interpret: bool  # XLA computes what the kernel would, on any device


def forward_kernel(settings: Settings, *refs: Ref) -> None:
    """Attended values and the logarithm of the sums, queries at rest."""
    pairs, refs = Pairs(*refs[:_PLANNED]), refs[_PLANNED:]
    query, key, value, query_facts, key_facts, out, logsumexp, *scratch = refs
    columns, highest, total, attended = scratch
    item, block = pl.program_id(1), settings.block
    dimension = query.shape[1]

    @pl.when(pairs.opens[item] == 1)
    def start() -> None:
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
    def finish() -> None:
        # Padding sees nothing: it gets 0.
        sums = jnp.where(total[...] == 0, 1.0, total[...])
        out[...] = (attended[...] / _across(sums, dimension)).astype(out.dtype)
        logsumexp[...] = (highest[...] + jnp.log(sums)).T[:1]


def query_kernel(settings: Settings, *refs: Ref) -> None:
    """The gradient to queries, which are at rest."""
    pairs, refs = Pairs(*refs[:_PLANNED]), refs[_PLANNED:]
    query, key, value, slope, logsumexp, delta, query_facts, key_facts, *rest = refs
    gradient, columns, statistics, total = rest
    item, block = pl.program_id(1), settings.block

    @pl.when(pairs.opens[item] == 1)
    def start() -> None:
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
    def finish() -> None:
        gradient[...] = (settings.scale * total[...]).astype(gradient.dtype)


def key_kernel(settings: Settings, *refs: Ref) -> None:
    """The gradients to keys and values, which are at rest."""
    pairs, refs = Pairs(*refs[:_PLANNED]), refs[_PLANNED:]
    query, key, value, slope, logsumexp, delta, query_facts, key_facts, *rest = refs
    to_key, to_value, columns, key_total, value_total = rest
    item, member, block = pl.program_id(1), pl.program_id(2), settings.block

    @pl.when((pairs.opens[item] == 1) & (member == 0))
    def start() -> None:
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
    def finish() -> None:
        to_key[...] = (settings.scale * key_total[...]).astype(to_key.dtype)
        to_value[...] = value_total[...].astype(to_value.dtype)


def _visit_as_planned(
    visible: Array,
    visit: Callable[[Callable[[Array], Array]], None],
    seen: Callable[[], Array],
) -> None:
    """Visits a pair of blocks: without a mask where none is needed, or not at all."""

    @pl.when(visible == WHOLLY)
    def wholly() -> None:
        visit(lambda scores: scores)

    @pl.when(visible == PARTLY)
    def partly() -> None:
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
