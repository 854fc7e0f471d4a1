"""What a compiled program does, counted from its text, loops turn by turn."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dpojax.planning.hlo import Program, parse
from dpojax.planning.walk import Counts, count
from dpojax.sharding import make_mesh

# Five turns, two at a time; in each a product of [4, 8] and [8, 8], and a permutation.
LOOP = """\
HloModule step, is_scheduled=true, num_partitions=4

%fused (p0: f32[4,8], p1: f32[8,8]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = f32[8,8]{1,0} parameter(1)
  ROOT %dot = f32[4,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}
}

%body (state: (u32[], f32[4,8], f32[8,8], u32[])) -> (u32[]) {
  %state = (u32[], f32[4,8]{1,0}, f32[8,8]{1,0}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%state), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %w = f32[8,8]{1,0} get-tuple-element(%state), index=2
  %limit = u32[] get-tuple-element(%state), index=3
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %y = f32[4,8]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused
  %start = (f32[4,8], f32[4,8], u32[]) collective-permute-start(%y), PAIRS
  %done = f32[4,8]{1,0} collective-permute-done(%start)
  ROOT %out = (u32[], f32[4,8], f32[8,8], u32[]) tuple(%next, %done, %w, /*3*/%limit)
}

%condition (state: (u32[], f32[4,8], f32[8,8], u32[])) -> pred[] {
  %state.1 = (u32[], f32[4,8]{1,0}, f32[8,8]{1,0}, u32[]) parameter(0)
  %i.1 = u32[] get-tuple-element(%state.1), index=0
  %limit.1 = u32[] get-tuple-element(%state.1), index=3
  ROOT %less = pred[] compare(%i.1, %limit.1), direction=LT
}

ENTRY %main (a: f32[4,8], b: f32[8,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %zero = u32[] constant(0)
  %copied = u32[] copy(%zero)
  %ten = u32[] LIMIT
  %initial = (u32[], f32[4,8]{1,0}, f32[8,8]{1,0}, u32[]) tuple(%copied, %a, %b, %ten)
  %loop = (u32[], f32[4,8], f32[8,8], u32[]) while(%initial), BODY, condition=%condition
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""
BODY = "body=%body"
PAIRS = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"


def loop(limit: str, body: str = BODY) -> Program:
    text = LOOP.replace("LIMIT", limit).replace("BODY", body).replace("PAIRS", PAIRS)
    return parse(text)


def test_a_loop_counts_as_often_as_its_counter_lets_it_turn():
    found = count(loop("constant(10)"))
    assert found.flops == 5 * 2 * 4 * 8 * 8
    assert found.sent_bytes == {"collective-permute": 5 * 4 * 8 * 4}
    assert found.num_sent == {"collective-permute": 5}
    # The fusion reads x and w and writes y; the permutation reads y and writes.
    assert found.memory_bytes >= 5 * 4 * ((32 + 64 + 32) + (32 + 32))


def test_the_compilers_own_number_of_turns_is_taken_where_it_is_told():
    told = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    found = count(loop("constant(10)", told))
    assert found.num_sent == {"collective-permute": 7}


def test_a_loop_that_depends_on_data_is_refused_unless_its_turns_are_told():
    program = loop("negate(%copied)")
    with pytest.raises(ValueError, match=r"The loop loop turns as often as data say"):
        count(program)
    assert count(program, lambda loop: 1.5).flops == 1.5 * 2 * 4 * 8 * 8


def entry(lines: str, header: str = "num_partitions=8") -> Counts:
    text = f"HloModule one, {header}\n\nENTRY %main (a: f32[16,4]) -> f32[16,4] {{\n"
    return count(parse(f"{text}  %a = f32[16,4]{{1,0}} parameter(0)\n{lines}\n}}\n"))


TWO_AXES = "mesh['x'=4,'y'=2], device_ids=([2,2,2]T(1,0,2))"


@pytest.mark.parametrize(
    ("operation", "groups", "expected"),
    [
        ("64,4 all-gather", "replica_groups={{0,1,2,3},{4,5,6,7}}", 3 * 256),
        ("64,4 all-gather", "replica_groups=[2,4]<=[8]", 3 * 256),
        ("64,4 all-gather", "replica_groups=mesh['x'=2,'y'=4] {'y'}", 3 * 256),
        ("16,4 all-to-all", f"replica_groups={TWO_AXES} {{'y'}}", 128),
        ("64,4 all-gather", "replica_groups=mesh['x'=8] {'x':(2)4}", 3 * 256),
        ("16,4 all-reduce", "replica_groups={}, to_apply=%add", 2 * 256 * 7 / 8),
        ("4,4 reduce-scatter", "replica_groups={{0,1,2,3}}", 256 * 3 / 4),
        ("16,4 all-to-all", "replica_groups={{0,1}}", 128),
        ("16,4 collective-permute", "source_target_pairs={{0,1},{2,2}}", 256 / 8),
    ],
)
def test_what_a_device_sends_in_each_collective(
    operation: str, groups: str, expected: float
):
    size, kind = operation.split()
    found = entry(f"  ROOT %out = f32[{size}] {kind}(%a), {groups}")
    assert found.sent_bytes == {kind: expected}


def test_a_collective_spread_over_a_chain_of_fusions_counts_where_it_starts():
    gather = 'f32[64,4] all-gather(%a), replica_groups=[2,4]<=[8], chain_id="3"'
    chain = "".join(f"  %g.{number} = {gather}\n" for number in (1, 2, 3))
    target = 'custom_call_target="AsyncCollective'
    start = f'  %s = (f32[16,4], f32[64,4]) custom-call(%g.1), {target}Start"\n'
    done = f'  ROOT %d = f32[64,4] custom-call(%g.3), {target}Done"'
    lines = chain + start + done
    found = entry(lines)
    assert found.num_sent == {"all-gather": 1}
    assert not found.kernels


def test_a_sum_of_which_each_device_keeps_a_part_counts_as_a_reduce_scatter():
    text = """\
HloModule one, num_partitions=8

%all-reduce-scatter (p: f32[16,4]) -> f32[8,4] {
  %p = f32[16,4] parameter(0)
  %zero = s32[] constant(0)
  %sum = f32[16,4] all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %part = f32[8,4] dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={8,4}
}

ENTRY %main (a: f32[16,4]) -> f32[8,4] {
  %a = f32[16,4] parameter(0)
  ROOT %own = f32[8,4] fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""
    assert count(parse(text)).sent_bytes == {"reduce-scatter": 128}


def test_what_begins_elsewhere_counts_once_where_it_begins():
    text = """\
HloModule one, num_partitions=2

%offloaded (p: f32[16,4]) -> f32[16,4] {
  %p = f32[16,4] parameter(0)
  ROOT %sum = f32[16,4] all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (a: f32[16,4]) -> f32[16,4] {
  %a = f32[16,4] parameter(0)
  %ready = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"
  %s = ((f32[16,4]), f32[16,4]) call-start(%a), to_apply=%offloaded
  ROOT %d = f32[16,4] call-done(%s)
}
"""
    found = count(parse(text))
    assert found.sent_bytes == {"all-reduce": 256}
    assert found.memory_bytes == 2 * 256


def test_groups_in_a_form_that_is_not_known_are_refused():
    with pytest.raises(ValueError, match="groups of a collective are not understood"):
        entry("  ROOT %o = f32[16,4] all-to-all(%a), replica_groups=some(4)")


def test_a_kernel_is_listed_with_its_own_name_and_not_counted():
    metadata = 'metadata={op_name="jit(f)/while/my_kernel/pallas_call"}'
    found = entry(
        '  ROOT %o = f32[16,4] custom-call(%a), custom_call_target="tpu_custom_call", '
        + metadata
    )
    assert [(kernel.name, times) for kernel, times in found.kernels.items()] == [
        ("my_kernel", 1)
    ]
    assert found.flops == 0


def test_of_what_is_sliced_or_kept_in_fast_memory_only_the_part_counts():
    lines = (
        "  %s = f32[2,4] slice(%a), slice={[0:2], [0:4]}\n"
        "  %fast = f32[16,4]{1,0:S(1)} copy(%a)\n"
        "  ROOT %o = f32[16,4]{1,0:S(1)} negate(%fast)"
    )
    assert entry(lines).memory_bytes == 2 * 32 + 256


def compiled(function: Callable, *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def test_a_scan_counts_what_the_compiler_counts_unrolled():
    weights, x = jnp.ones((6, 64, 64)), jnp.ones((128, 64))

    def run(weights: Any, x: Any, unroll: int) -> Any:
        def layer(x: Any, weight: Any) -> tuple[Any, None]:
            return x @ weight, None

        return jnp.sum(jax.lax.scan(layer, x, weights, unroll=unroll)[0] ** 2)

    def slope(unroll: int) -> Callable:
        return jax.grad(lambda weights, x: run(weights, x, unroll), argnums=(0, 1))

    looped = count(parse(compiled(slope(1), weights, x).as_text())).flops
    unrolled = compiled(slope(6), weights, x)
    assert looped == count(parse(unrolled.as_text())).flops
    assert looped == 6 * 3 * 2 * 128 * 64 * 64
    assert unrolled.cost_analysis()["flops"] == pytest.approx(looped, rel=0.02)


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_places_of_a_convolution_that_meet_gaps_and_padding_count_nothing(gap: int):
    def convolve(left: Any, right: Any) -> Any:
        return jax.lax.conv_general_dilated(
            left, right, (2, 1), [(1, 1), (0, 2)], (gap, 1), (1, gap)
        )

    program = compiled(convolve, jnp.ones((2, 6, 9, 7)), jnp.ones((4, 6, 3, 2)))
    expected = program.cost_analysis()["flops"]
    assert count(parse(program.as_text())).flops == pytest.approx(expected, rel=1e-6)


def test_parameters_shared_by_devices_are_gathered_for_three_quarters():
    if jax.device_count() != 4:
        pytest.skip("needs four virtual devices")
    mesh = make_mesh(1, 4, 1)
    rows = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((64, 32), "float32", sharding=rows)
    weight = jax.ShapeDtypeStruct((32, 32), "float32", sharding=rows)
    found = count(parse(compiled(lambda x, w: x @ w, x, weight).as_text()))
    assert found.sent_bytes == {"all-gather": 32 * 32 * 4 * 3 / 4}
    assert found.flops == 2 * 16 * 32 * 32
