"""Which blocks of queries and keys meet under the mask rule of the row layout.

A kernel that visits blocks is given a list of those that the mask does not empty, so
that a row costs what its examples cost. Whether two blocks meet is told from summaries
of pieces of them: no mask of tokens by tokens is made. A pair of blocks may be listed
though nothing in it is visible, never the other way round. This file knows no kernel.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dpojax.models.attention import Window

NOTHING, PARTLY, WHOLLY = 0, 1, 2  # how much of a pair of blocks is visible
PIECE = 128  # tokens that one summary is of, at most
_BRANCH_BITS = 16  # so a row holds fewer than 2^15 examples of fewer than 2^16 branches
_LARGE = jnp.iinfo(jnp.int32).max


class Facts(NamedTuple):
    """What the mask needs of each token beside its index in the row.

    A key is visible to a query when its code is the query's own or that of the query's
    prompt and, under a window, its position is no less than the oldest.
    """

    query: Int[Array, "rows query_facts length"]  # own code, prompt's code, oldest
    key: Int[Array, "rows key_facts length"]  # code, position


class Pairs(NamedTuple):
    """Pairs of blocks in the order in which they are visited, one row after another.

    One block of a pair is at rest while others pass by; all its pairs follow each
    other, and every block is at rest at least once, so that its result is written.
    """

    row: Int[Array, " pairs"]
    resting: Int[Array, " pairs"]
    passing: Int[Array, " pairs"]
    visible: Int[Array, " pairs"]  # NOTHING, PARTLY or WHOLLY
    opens: Int[Array, " pairs"]  # 1: the first pair of the block at rest
    closes: Int[Array, " pairs"]  # 1: its last


class Plan(NamedTuple):
    """Which pairs are visited: the first `count` of as many as there can be."""

    pairs: Pairs
    count: Int[Array, ""]


class _Extremes(NamedTuple):
    """Of what holds for the tokens of each piece that are not padding."""

    lowest: Int[Array, "rows queries keys"]  # of either, the other's number is 1
    highest: Int[Array, "rows queries keys"]


def make_facts(
    example: Int[Array, "rows length"],
    branch: Int[Array, "rows length"],
    window: Window | None,
) -> Facts:
    """Facts under which padding neither sees nor is seen."""
    prompt = example << _BRANCH_BITS
    is_real = example > 0
    query = [jnp.where(is_real, prompt + branch, -1), jnp.where(is_real, prompt, -1)]
    key = [jnp.where(is_real, prompt + branch, -2)]
    if window is not None:
        query.append(window.position - window.size + 1)
        key.append(window.position)
    return Facts(jnp.stack(query, axis=1), jnp.stack(key, axis=1))


def make_plans(
    example: Int[Array, "rows length"],
    branch: Int[Array, "rows length"],
    window: Window | None,
    block: int,
) -> tuple[Plan, Plan]:
    """Plans with queries at rest and with keys at rest.

    Args:
      example: number of the example that each token belongs to; 0 is padding.
      branch: 0 for a prompt's token, k for one of the k-th completion.
      window: how far back a token sees; None: all of its sequence.
      block: tokens of a block; divides the length.
    """
    visible = visible_blocks(example, branch, window, block)
    return _list(visible), _list(visible.swapaxes(1, 2))


def count_pairs(num_rows: int, num_blocks: int) -> int:
    """The most pairs of a plan: no query sees keys of later blocks."""
    return num_rows * num_blocks * (num_blocks + 1) // 2


def visible_blocks(
    example: Int[Array, "rows length"],
    branch: Int[Array, "rows length"],
    window: Window | None,
    block: int,
) -> Int[Array, "rows query_blocks key_blocks"]:
    """How much each block of queries sees of each block of keys."""
    piece = math.gcd(block, PIECE)
    some, every = _visible_pieces(example, branch, window, piece)
    by_block = example.shape[1] // block, block // piece
    shape = (example.shape[0], *by_block, *by_block)
    some = some.reshape(shape).any(axis=(2, 4))
    every = every.reshape(shape).all(axis=(2, 4))
    return jnp.where(every, WHOLLY, jnp.where(some, PARTLY, NOTHING))


def _visible_pieces(
    example: Array, branch: Array, window: Window | None, piece: int
) -> tuple[Bool[Array, "rows pieces pieces"], Bool[Array, "rows pieces pieces"]]:
    """Whether pieces of queries may see something of pieces of keys, and all of it."""
    real = (example > 0).reshape(len(example), -1, piece)

    def summarize(values: Array) -> tuple[_Extremes, _Extremes]:
        pieces = values.reshape(real.shape)
        low = jnp.where(real, pieces, _LARGE).min(-1)
        high = jnp.where(real, pieces, -_LARGE).max(-1)
        of_queries = _Extremes(low[:, :, None], high[:, :, None])
        return of_queries, _Extremes(low[:, None, :], high[:, None, :])

    examples, branches = summarize(example), summarize(branch)
    _, keys = branches
    full, index = real.all(-1), jnp.arange(real.shape[1])
    some = _overlap(*examples) & (index <= index[:, None])
    some &= ~_one(*examples) | (keys.lowest == 0) | _overlap(*branches)
    every = _one(*examples) & (index < index[:, None])
    every &= full[:, :, None] & full[:, None, :]
    every &= (keys.highest == 0) | _one(*branches)
    if window is not None:
        oldest, _ = summarize(window.position - window.size + 1)
        _, keys = summarize(window.position)
        some &= keys.highest >= oldest.lowest
        every &= keys.lowest >= oldest.highest
    return some, every


def _overlap(one: _Extremes, other: _Extremes) -> Bool[Array, "rows pieces pieces"]:
    return (one.lowest <= other.highest) & (other.lowest <= one.highest)


def _one(one: _Extremes, other: _Extremes) -> Bool[Array, "rows pieces pieces"]:
    """Whether both hold one value, the same."""
    return (one.lowest == other.highest) & (one.highest == other.lowest)


def _list(visible: Int[Array, "rows resting passing"]) -> Plan:
    """The pairs that are visible, and each block's pair with itself."""
    num_rows, num_blocks = visible.shape[:2]
    listed = (visible != NOTHING) | jnp.eye(num_blocks, dtype=bool)
    most = count_pairs(num_rows, num_blocks)
    index = jnp.nonzero(listed.reshape(-1), size=most, fill_value=0)[0]
    count = jnp.sum(listed, dtype=jnp.int32)
    block, passing = jnp.divmod(index.astype(jnp.int32), num_blocks)
    row, resting = jnp.divmod(block, num_blocks)
    changes = block[1:] != block[:-1]
    opens = jnp.concatenate([jnp.array([True]), changes])
    closes = jnp.concatenate([changes, jnp.array([True])])
    closes |= jnp.arange(most) == count - 1
    pairs = Pairs(
        row=row,
        resting=resting,
        passing=passing,
        visible=visible.reshape(-1)[index],
        opens=opens.astype(jnp.int32),
        closes=closes.astype(jnp.int32),
    )
    return Plan(pairs, count)
