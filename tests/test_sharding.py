"""The mesh, and the sharding of a decoder's parameters. Moves next to nothing."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dpojax.models.decoder import DecoderConfig, make_model
from dpojax.models.shape import ExpertShape
from dpojax.sharding import (
    ROWS,
    as_shardings,
    make_look_up,
    make_mesh,
    make_placement,
    num_row_shards,
    rows_sharding,
)
from dpojax.slices import arrange


def make_params(width: int = 32, vocabulary_size: int = 64, **fields: Any) -> Any:
    config = DecoderConfig(
        vocabulary_size=vocabulary_size,
        width=width,
        num_layers=3,
        num_heads=4,
        num_key_heads=2,
        head_dimension=8,
        mlp_width=48,
        qkv_bias=True,
        **fields,
    )
    return make_model(config).params


def as_specs(tree: Any, mesh: jax.sharding.Mesh) -> dict[str, P]:
    leaves = jax.tree.leaves_with_path(as_shardings(tree, mesh))
    name = jax.tree_util.keystr
    return {
        name(path, simple=True, separator="/"): sharding.spec
        for path, sharding in leaves
    }


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (4, 1, 1, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 2, 1, 1, 1)),
        ({"data": 1, "fsdp": 2, "tensor": -1}, (1, 2, 1, 1, 2)),
        ({"data": -1, "tensor": 4}, (1, 1, 1, 1, 4)),
        ({"data": 1, "fsdp": 4}, (1, 4, 1, 1, 1)),
        ({"expert": 2}, (2, 1, 2, 1, 1)),
        ({"context": 2}, (2, 1, 1, 2, 1)),
    ],
)
def test_one_size_may_be_what_is_left_of_the_devices(
    sizes: dict[str, Any], expected: tuple[int, ...]
):
    mesh = make_mesh(**sizes)
    assert tuple(mesh.shape.values()) == expected
    assert num_row_shards(mesh) == 4 // expected[3] // expected[4]


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3},
        {"data": 8},
        {"data": -1, "fsdp": 3},
        {"data": -1, "fsdp": 8},
        {"data": -1, "fsdp": -1},
        {"data": -1, "fsdp": 0},
        {"data": 0, "fsdp": 4},
        {"data": -2, "fsdp": -2},
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes: dict[str, Any]):
    with pytest.raises(ValueError, match="does not fit 4 devices"):
        make_mesh(**sizes)


def test_rules_give_each_parameter_its_spec():
    blocks = {
        f"blocks/{name}/{kind}": spec
        for names, kind, spec in [
            (("attention/query", "attention/key", "attention/value"), "kernel",
             P(None, "fsdp", "tensor")),
            (("mlp/gate", "mlp/up"), "kernel", P(None, "fsdp", "tensor")),
            (("attention/output", "mlp/down"), "kernel", P(None, "tensor", "fsdp")),
            (("attention/query", "attention/key", "attention/value"), "bias",
             P(None, "tensor")),
            (("attention_norm", "mlp_norm"), "scale", P()),
        ]
        for name in names
    }  # fmt: skip
    expected = blocks | {
        "embedding/embedding": P("tensor", "fsdp"),
        "output/embedding": P("tensor", "fsdp"),
        "norm/scale": P(),
    }
    params = make_params()
    assert as_specs(params, make_mesh(data=2, fsdp=2)) == expected
    assert as_specs(params, make_mesh(data=2, tensor=2)) == expected


def test_every_device_has_a_part_of_every_expert():
    shape = ExpertShape(number=3, per_token=1, width=8, renormalised=True)
    specs = as_specs(make_params(experts=shape), make_mesh(data=1, fsdp=2, tensor=2))
    experts = {
        name.removeprefix("blocks/experts/"): spec
        for name, spec in specs.items()
        if "experts" in name
    }
    assert experts == {
        "router/kernel": P(),
        "gate/kernel": P(None, "expert", "fsdp", "tensor"),
        "up/kernel": P(None, "expert", "fsdp", "tensor"),
        "down/kernel": P(None, "expert", "tensor", "fsdp"),
    }


def test_a_scalar_head_is_whole_on_every_device_and_so_is_its_optimizer():
    params = {"score": {"embedding": jax.ShapeDtypeStruct((1, 32), jnp.float32)}}
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    for tree in (params, state):
        specs = as_specs(tree, make_mesh(data=1, fsdp=2, tensor=2))
        assert set(specs.values()) == {P()}


def test_shards_are_the_parts_that_the_mesh_says():
    params = make_params()
    shapes = {
        mesh_sizes: {
            name: as_shardings(params, make_mesh(*mesh_sizes))["blocks"]["mlp"][name][
                "kernel"
            ].shard_shape(params["blocks"]["mlp"][name]["kernel"].shape)
            for name in ("up", "down")
        }
        for mesh_sizes in [(2, 2, 1), (2, 1, 2), (1, 2, 2)]
    }
    assert shapes == {
        (2, 2, 1): {"up": (3, 16, 48), "down": (3, 48, 16)},
        (2, 1, 2): {"up": (3, 32, 24), "down": (3, 24, 32)},
        (1, 2, 2): {"up": (3, 16, 24), "down": (3, 24, 16)},
    }


def test_a_dimension_that_its_axes_do_not_divide_stays_whole():
    specs = as_specs(make_params(30, 63), make_mesh(data=1, fsdp=4))
    assert specs["embedding/embedding"] == P("tensor", None)
    assert specs["blocks/mlp/up/kernel"] == P(None, None, "tensor")
    specs = as_specs(make_params(30, 63), make_mesh(data=1, tensor=4))
    assert specs["embedding/embedding"] == P(None, "fsdp")
    assert specs["blocks/mlp/down/kernel"] == P(None, "tensor", "fsdp")


def test_the_state_of_the_optimizer_is_sharded_like_its_parameters():
    params = make_params()
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    mesh = make_mesh(data=2, fsdp=2)
    wanted, shardings = as_shardings(params, mesh), as_shardings(state, mesh)
    assert shardings[0].mu == wanted
    assert shardings[0].nu == wanted
    assert shardings[0].count.spec == P()


@dataclass(frozen=True)
class FakeChip:
    """What of a TPU's device decides where it goes in a mesh."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def test_slices_share_no_copy_of_the_model():
    chips: Any = [
        FakeChip(4 * part + x + 2 * y, part, (x, y, 0))
        for part in (0, 1)
        for x, y in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    for sizes in ((2, 2, 1, 2), (2, 4, 1, 1), (4, 2, 1, 1)):
        placed = arrange(sizes, chips[::-1])
        halves = placed.reshape(2, -1)
        for part, half in enumerate(halves):
            assert {chip.slice_index for chip in half} == {part}
        assert {chip.id for chip in placed.flat} == set(range(8))
    with pytest.raises(ValueError, match="in 2 slices.* --mesh.data is 1 and must"):
        arrange((1, 8, 1, 1), chips)


def test_own_rows_are_placed_as_whole_batches_are():
    placement = make_placement(make_mesh(data=2, tensor=2))
    rows = np.arange(24).reshape(8, 3)
    own = placement.own_rows(8)
    assert own.tolist() == list(range(8))  # a process that is alone has all of them
    whole, parts = placement.put(rows), placement.put_own(rows[own])
    assert whole.sharding == parts.sharding
    np.testing.assert_array_equal(whole, parts)


def test_rows_are_placed_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2)
    placement = make_placement(mesh)
    placed = placement.put({"tokens": jnp.arange(24).reshape(8, 3)})["tokens"]
    assert placement.num_shards == 4
    assert placed.sharding == rows_sharding(mesh)
    assert placed.sharding.spec == ROWS
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    starts = {int(shard.data[0, 0]) for shard in placed.addressable_shards}
    assert starts == {0, 6, 12, 18}


@pytest.mark.parametrize("width", [16, 15])  # divided, and whole
def test_tokens_are_looked_up_in_each_devices_part_of_the_width(
    width: int,
):
    """The compiled step of a slice shows why; a CPU's compiler finds it by itself."""
    mesh = make_mesh(data=2, fsdp=2)
    table = np.random.default_rng(0).normal(size=(77, width)).astype(np.float32)
    tokens = np.arange(24, dtype=np.int32).reshape(4, 6) * 3
    divided = jax.device_put(
        table, as_shardings({"embedding": table}, mesh)["embedding"]
    )
    found = jax.jit(make_look_up(mesh))(
        divided, jax.device_put(tokens, rows_sharding(mesh))
    )
    assert np.array_equal(found, table[tokens])
    if width % 2 == 0:
        assert found.sharding.shard_shape(found.shape) == (2, 6, width // 2)
