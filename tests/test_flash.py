"""Flash attention, emulated, against attention under the same masks.

What the kernels do is the same on a TPU; that they compile for one is not tested here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpojax.data.packing import Example, as_batch
from dpojax.models.attention import Window, attention, visible
from dpojax.models.cudnn import cudnn_attention
from dpojax.models.flash import choose_block, flash_attention
from dpojax.models.flash_plan import NOTHING, WHOLLY, make_plans, visible_blocks
from dpojax.sharding import make_by_shard_and_head, make_mesh

BLOCK, DIMENSION = 16, 8
flash = partial(flash_attention, block=BLOCK, interpret=True)


class Rows(NamedTuple):
    example: jax.Array
    branch: jax.Array
    position: jax.Array

    @property
    def real(self) -> jax.Array:
        return self.example > 0


class Heads(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    slope: jax.Array  # the gradient to what the queries get


def make_rows() -> Rows:
    """Packed rows of ragged examples, of an odd length, the last of padding alone."""
    random = np.random.default_rng(0)

    def tokens(most: int) -> np.ndarray:
        return np.full(random.integers(1, most), 3)

    examples = [
        Example(tokens(12), (tokens(14), tokens(14), tokens(6))) for _ in range(3)
    ]
    examples.append(Example(np.full(40, 3), (tokens(3),)))
    rows = [[examples[3]], examples[:2], [examples[2]], []]
    batch = as_batch(rows, length=45, num_slots=2, num_completions=3)
    return Rows(*map(jnp.asarray, (batch.example, batch.branch, batch.position)))


def make_heads(rows: Rows, num_heads: int, num_key_heads: int) -> Heads:
    random = np.random.default_rng(1)
    counts = (num_heads, num_key_heads, num_key_heads, num_heads)
    shapes = [(*rows.example.shape, count, DIMENSION) for count in counts]
    return Heads(*(jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes))


@partial(jax.jit, static_argnums=0)
def value_and_gradients(
    function: Callable, heads: Heads, rows: Rows, size: jax.Array | None = None
) -> Any:
    """What tokens get, and the gradients to queries, keys and values."""
    window = None if size is None else Window(rows.position, size)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return function(query, key, value, rows.example, rows.branch, window=window)

    attended, pull = jax.vjp(attend, heads.query, heads.key, heads.value)
    return attended, pull(heads.slope)


def expect(
    function: Callable, heads: Heads, rows: Rows, size: jax.Array | None = None
) -> Any:
    """The same of attention, but that padding gets nothing and asks for nothing."""
    real = rows.real[..., None, None]
    heads = heads._replace(slope=jnp.where(real, heads.slope, 0))
    attended, gradients = value_and_gradients(function, heads, rows, size)
    return jnp.where(real, attended, 0), gradients


def assert_equal(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, found, expected)


def test_values_and_gradients_equal_attention_on_packed_rows():
    rows = make_rows()
    heads = make_heads(rows, 2, 2)
    found = value_and_gradients(partial(flash, scale=0.5), heads, rows)
    assert_equal(found, expect(partial(attention, scale=0.5), heads, rows))
    padding = ~rows.real
    for array in jax.tree.leaves(found):
        np.testing.assert_array_equal(array[padding], 0)


def test_grouped_capped_heads_under_windows_equal_attention_on_any_rows():
    """Also where examples and branches are in no order; sizes of windows are traced."""
    functions = partial(flash, cap=1.5), partial(attention, cap=1.5)
    packed = make_rows()
    heads = make_heads(packed, 4, 2)
    random = np.random.default_rng(2)
    for size in map(jnp.asarray, (1, 5, 17, 99)):
        runs = random.integers(0, 3, (2, 4, 15)).repeat(3, axis=2)
        mixed = packed._replace(
            example=jnp.asarray(runs[0]), branch=jnp.asarray(runs[1])
        )
        for rows in (packed, mixed):
            found = value_and_gradients(functions[0], heads, rows, size)
            assert_equal(found, expect(functions[1], heads, rows, size))


def test_bfloat16_is_near_float32_and_stays_bfloat16():
    rows = make_rows()
    heads = make_heads(rows, 2, 1)
    coarse = Heads(*(array.astype(jnp.bfloat16) for array in heads))
    found = value_and_gradients(flash, coarse, rows)
    assert {array.dtype for array in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    exact = Heads(*(array.astype(jnp.float32) for array in coarse))
    expected = expect(attention, exact, rows)
    assert_equal(jax.tree.map(lambda x: x.astype(jnp.float32), found), expected, 5e-2)


_visible = jax.jit(
    lambda example, branch, window: visible(
        example, branch, example.shape[1], window=window
    )
)
_visible_blocks = jax.jit(visible_blocks, static_argnums=3)
PLAN_BLOCK = 256
ids = st.lists(st.integers(0, 2), min_size=8, max_size=8)
# Often whole pieces and blocks.
lengths_of_runs = st.lists(st.sampled_from([1, 128, 200, 256]), min_size=8, max_size=8)


windows = st.tuples(st.sampled_from([100, 2000]), st.sampled_from([1, 200, 600]))


@given(ids, ids, lengths_of_runs, st.none() | windows)
@example([1] * 8, [0] * 8, [128] * 8, (2000, 450))
@settings(deadline=None, derandomize=True, database=None, max_examples=80)
def test_no_visible_block_is_left_out_and_none_is_taken_for_whole_that_is_not(
    examples: list[int],
    branches: list[int],
    lengths: list[int],
    period_and_size: tuple[int, int] | None,
):
    total = 4 * PLAN_BLOCK

    def spread(values: list[int]) -> jax.Array:
        row = np.repeat(values, lengths)[:total]
        return jnp.asarray(np.pad(row, (0, total - len(row))))[None]

    example, branch = spread(examples), spread(branches)
    window = None
    if period_and_size is not None:
        period, size = period_and_size
        window = Window(jnp.arange(total)[None] % period, size)
    mask = np.asarray(_visible(example, branch, window) & (example > 0)[:, None])
    blocks = mask.reshape(4, PLAN_BLOCK, 4, PLAN_BLOCK).swapaxes(1, 2)
    found = np.asarray(_visible_blocks(example, branch, window, PLAN_BLOCK))[0]
    assert not (blocks.any((2, 3)) & (found == NOTHING)).any()
    assert not (~blocks.all((2, 3)) & (found == WHOLLY)).any()


def test_a_row_costs_the_blocks_of_its_own_examples():
    """Two examples of 512 of which the second has completions of 256, then padding.

    In blocks of 128, by hand: 4 + 3 + 2 + 1 of the first; of the second's blocks, its
    prompt's two see 1 + 2, its first completion's two 3 + 4, its second completion's
    two 3 + 4, no key of the first; each of two blocks of padding is written once.
    """
    example = jnp.repeat(jnp.array([[1, 2, 0]]), jnp.array([512, 768, 256]), axis=1)
    branch = jnp.zeros_like(example).at[:, 768:1024].set(1).at[:, 1024:1280].set(2)
    for plan in jax.jit(make_plans, static_argnums=3)(example, branch, None, 128):
        assert plan.count == 10 + 3 + 7 + 7 + 2
    found = _visible_blocks(example, branch, None, 128)
    # The first example sees all of 3 + 2 + 1 blocks, the second of 1 + 2 + 3 + 2 + 3.
    assert jnp.sum(found == WHOLLY) == 6 + 11


def test_a_kept_result_is_not_computed_again_also_within_shards():
    rows = make_rows()
    heads = make_heads(rows, 2, 2)
    keep = jax.checkpoint_policies.save_only_these_names("attention")
    by_shard = make_by_shard_and_head(make_mesh(data=2, tensor=2))

    def count(function: Callable, policy: Callable | None) -> int:
        def total(heads: Heads) -> jax.Array:
            attended = function(*heads[:3], rows.example, rows.branch)
            return jnp.sum(jnp.sin(attended))

        gradient = jax.grad(jax.checkpoint(total, policy=policy))
        return str(jax.make_jaxpr(gradient)(heads)).count("name=flash_forward")

    for function in (flash, by_shard(flash)):
        assert count(function, keep) == 1
        assert count(function, None) == 2


@pytest.mark.parametrize(
    ("sizes", "num_key_heads"), [((2, 1, 2), 2), ((1, 2, 2), 1)], ids=str
)
def test_shards_of_rows_and_heads_equal_the_whole(
    sizes: tuple[int, int, int], num_key_heads: int
):
    """Where ``tensor`` does not divide the heads of keys, each has all heads."""
    rows, size = make_rows(), jnp.asarray(9)
    heads = make_heads(rows, 2 * num_key_heads, num_key_heads)
    sharded = make_by_shard_and_head(make_mesh(*sizes))(flash)
    found = value_and_gradients(sharded, heads, rows, size)
    assert_equal(found, expect(attention, heads, rows, size))


def test_blocks_fill_rows_up_evenly():
    lengths = [1, 128, 512, 513, 640, 1100, 2048, 3000]
    expected = [128, 128, 512, 384, 384, 384, 512, 512]
    assert [choose_block(length) for length in lengths] == expected


@pytest.mark.parametrize(
    ("shape", "dtypes", "block", "message"),
    [
        ((1, 8, 2, 8), "eee", 8, "'float16', 'float16', 'float16'"),
        ((1, 8, 2, 8), "fef", 8, "'float32', 'float16', 'float32'"),
        ((1, 8, 3, 8), "fff", 8, "3 heads of queries and 2"),
        ((1, 8, 2, 264), "fff", 8, "at most 256 dimensions, not 264"),
        ((1, 8, 2, 8), "fff", 0, "blocks of 0 tokens"),
        ((400, 8000, 2, 8), "fff", 512, "54400 pairs of blocks of 512"),
    ],
)
def test_what_the_kernels_do_not_serve_is_refused(
    shape: tuple[int, ...], dtypes: str, block: int, message: str
):
    shapes = shape, (*shape[:2], 2, shape[3]), (*shape[:2], 2, shape[3])
    heads = map(jax.ShapeDtypeStruct, shapes, map(np.dtype, dtypes))
    rows = [jax.ShapeDtypeStruct(shape[:2], jnp.int32)] * 2
    function = partial(flash_attention, block=block, interpret=True)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(function, *heads, *rows)


def test_blocks_that_are_no_multiple_of_the_lanes_are_for_emulation_only():
    rows = make_rows()
    heads = make_heads(rows, 2, 2)
    with pytest.raises(ValueError, match="blocks of 16 tokens; on a TPU"):
        flash_attention(*heads[:3], rows.example, rows.branch, block=16)


@pytest.mark.parametrize(
    ("shape", "dtype", "cap", "message"),
    [
        ((1, 8, 2, 8), jnp.float32, None, "given float32"),
        ((1, 8, 2, 8), jnp.bfloat16, 30.0, "no soft cap.* at 30.0"),
        ((1, 8, 2, 12), jnp.bfloat16, None, "multiple of 8, not 12"),
        ((1, 7, 2, 8), jnp.bfloat16, None, "rows of 7 tokens"),
    ],
)
def test_what_cudnn_does_not_serve_is_refused(
    shape: tuple[int, ...], dtype: Any, cap: float | None, message: str
):
    heads = [jax.ShapeDtypeStruct(shape, dtype)] * 3
    rows = [jax.ShapeDtypeStruct(shape[:2], jnp.int32)] * 2
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(cudnn_attention, cap=cap), *heads, *rows)


def test_cudnn_is_called_forward_and_backward_when_lowered_for_cuda(
    monkeypatch: pytest.MonkeyPatch,
):
    room = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{room}.check_cudnn_version", lambda: 91000)
    calls = [f"__cudnn$fmhaScaleBiasSoftmax{suffix}" for suffix in ("", "Backward")]

    def gradient(heads: tuple, rows: tuple) -> Any:
        return jax.vjp(lambda *x: cudnn_attention(*x, *rows), *heads)[1](heads[0])

    heads = [jax.ShapeDtypeStruct((2, 32, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
    rows = [jax.ShapeDtypeStruct((2, 32), jnp.int32)] * 2
    exported = jax.export.export(
        jax.jit(gradient),
        platforms=["cuda"],
        disabled_checks=list(map(jax.export.DisabledSafetyCheck.custom_call, calls)),
    )(tuple(heads), tuple(rows))
    for call in calls:
        assert f"@{call}(" in exported.mlir_module()
