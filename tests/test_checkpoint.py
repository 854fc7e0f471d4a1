"""Checkpoints: what comes back, onto which devices, and what is kept.

The state is that of a training step, but of two small arrays and no model.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpojax.checkpoint import Checkpoints
from dpojax.sharding import as_shardings, make_mesh
from dpojax.train_step import TrainState, init_state

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step: int, mesh: Mesh, width: int = 8) -> TrainState:
    """Numbers that tell the step, sharded by the project's rules."""
    params = {
        "embedding": {"embedding": jnp.full((16, width), step, jnp.float32)},
        "norm": {"scale": jnp.arange(width) + jnp.float32(step)},
    }
    state = init_state(params, OPTIMIZER)._replace(step=jnp.array(step))
    return jax.device_put(state, as_shardings(state, mesh))


def as_abstract(state: Any, mesh: Mesh) -> Any:
    def abstract(array: jax.Array, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(abstract, state, as_shardings(state, mesh))


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(data=2, fsdp=2)


@pytest.fixture(scope="module")
def directory(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of five evaluations, the second being the best."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(path, keep_last=2)
    for step, loss in [(10, 0.6), (20, 0.3), (30, 0.5), (40, 0.4), (50, 0.7)]:
        note = {"step": step, "model": "llama", "seeds": [0, 1]}
        checkpoints.save(step, make_state(step, mesh), note, loss)
    checkpoints.close()
    return path


@pytest.fixture
def checkpoints(directory: Path):
    opened = Checkpoints(directory, keep_last=2)
    yield opened
    opened.close()


def test_the_last_two_and_the_best_are_kept(checkpoints: Checkpoints):
    assert checkpoints.steps == [20, 40, 50]


def test_a_state_comes_back_onto_the_same_devices(checkpoints: Checkpoints, mesh: Mesh):
    state = make_state(50, mesh)
    restored = checkpoints.restore(50, as_abstract(state, mesh))
    assert_same(restored, state)
    assert isinstance(restored, TrainState)
    found, wanted = (
        jax.tree.map(lambda array: array.sharding, tree) for tree in (restored, state)
    )
    assert found == wanted


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), (1, 2, 2)])
def test_a_state_comes_back_onto_another_mesh(
    checkpoints: Checkpoints, sizes: tuple[int, int, int]
):
    other = make_mesh(*sizes)
    state = make_state(20, other)
    restored = checkpoints.restore(20, as_abstract(state, other))
    assert_same(restored, state)
    embedding = restored.params["embedding"]["embedding"]
    assert embedding.sharding.spec == PartitionSpec("tensor", "fsdp")
    _, fsdp, tensor = sizes
    shapes = {shard.data.shape for shard in embedding.addressable_shards}
    assert shapes == {(16 // tensor, 8 // fsdp)}


def test_a_state_comes_back_onto_one_device(checkpoints: Checkpoints, mesh: Mesh):
    state = make_state(40, mesh)
    single = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    like = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=single),
        state,
    )
    restored = checkpoints.restore(40, like)
    assert_same(restored, state)
    assert restored.params["norm"]["scale"].devices() == {jax.devices()[3]}


def test_the_parameters_alone_can_be_restored(checkpoints: Checkpoints, mesh: Mesh):
    params = make_state(40, mesh).params
    restored = checkpoints.restore(40, {"params": as_abstract(params, mesh)})
    assert_same(restored, {"params": params})


def test_a_note_comes_back(checkpoints: Checkpoints):
    assert checkpoints.note(20) == {"step": 20, "model": "llama", "seeds": [0, 1]}
    assert checkpoints.note(50)["step"] == 50


@pytest.mark.parametrize("part", ["state", "params"])
def test_the_checkpoint_of_another_model_is_refused_naming_the_array(
    checkpoints: Checkpoints, mesh: Mesh, part: str
):
    like = as_abstract(make_state(50, mesh, width=12), mesh)
    wanted = like if part == "state" else {"params": like.params}
    message = r"step 50 .* of another model .*embedding is \(16, 8\) .* \(16, 12\) here"
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(50, wanted)


def test_a_checkpoint_with_more_or_fewer_arrays_is_refused_naming_one(
    checkpoints: Checkpoints, mesh: Mesh
):
    params = as_abstract(make_state(50, mesh).params, mesh)
    scale = params["norm"]["scale"]
    more = params | {"bias": scale}
    with pytest.raises(
        ValueError, match=r"params/bias is absent there and \(8,\) here"
    ):
        checkpoints.restore(50, {"params": more})
    fewer = {"norm": params["norm"]}
    message = r"params/embedding/embedding is \(16, 8\) there and absent here"
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(50, {"params": fewer})


def test_a_missing_step_is_refused_with_those_there_are(
    checkpoints: Checkpoints, mesh: Mesh, tmp_path: Path
):
    like = as_abstract(make_state(50, mesh), mesh)
    message = "has no checkpoint of step 30; it has 20, 40, 50"
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(30, like)
    with pytest.raises(ValueError, match=message):
        checkpoints.note(30)
    empty = Checkpoints(tmp_path / "empty")
    assert empty.steps == []
    with pytest.raises(ValueError, match="has no checkpoint of step 1; it has none"):
        empty.restore(1, like)
    empty.close()


def test_after_reopening_the_best_is_still_kept_until_there_is_a_better(
    directory: Path, mesh: Mesh, tmp_path: Path
):
    import shutil

    path = Path(shutil.copytree(directory, tmp_path / "checkpoints"))
    kept = []
    for step, loss in [(60, 0.9), (70, 0.2), (80, 0.8), (90, 0.8)]:
        checkpoints = Checkpoints(path, keep_last=2)
        checkpoints.save(step, make_state(step, mesh), {}, loss)
        checkpoints.close()
        kept.append(checkpoints.steps)
    assert kept == [[20, 50, 60], [60, 70], [70, 80], [70, 80, 90]]
