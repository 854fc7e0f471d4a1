"""Loss and gradients of differing families on several devices equal those of one.

Two devices divide neither the heads nor the vocabulary. The vocabulary stays whole;
projections are divided by their outputs, in the midst of a head.
"""

from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest
from tiny_models import keep_gradient

from dpojax.data.packing import Example, as_batch
from dpojax.losses.make import make_loss
from dpojax.metrics import summarize
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.functional import Params
from dpojax.sharding import as_shardings, make_constrain, make_mesh, rows_sharding
from dpojax.train_step import init_state, make_train_step

SIZES = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "initializer_range": 0.2,
}
GPT_SIZES = {
    "vocab_size": 41,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "initializer_range": 0.2,
}
CASES: dict[str, dict[str, Any]] = {
    "gemma3": {
        **SIZES,
        "model_type": "gemma3_text",
        "head_dim": 6,
        "sliding_window": 3,
        "sliding_window_pattern": 2,
    },
    "gpt2": {**GPT_SIZES, "model_type": "gpt2"},
    "gpt_neox": {**SIZES, "model_type": "gpt_neox", "rotary_pct": 0.5},
    # Longrope: lengths of sequences are found row by row.
    "phi3": {
        **SIZES,
        "model_type": "phi3",
        "max_position_embeddings": 32,
        "original_max_position_embeddings": 8,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    },
    "olmo2": {**SIZES, "model_type": "olmo2", "num_key_value_heads": 1},
}
MESHES: dict[str, Any] = {
    "fsdp": {"data": 2, "fsdp": 2},
    "tensor": {"data": 2, "tensor": 2},
}


def make_examples() -> list[Example]:
    random = np.random.default_rng(0)

    def some(count: int) -> np.ndarray:
        return random.integers(0, 41, count).astype(np.int32)

    return [Example(some(n), (some(2 * n), some(7 - n))) for n in (1, 2, 3, 4, 5)]


def random_like(params: Params) -> Params:
    """Biases and norms too, which start from one number; scales are around 1."""
    random = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return random.normal(mean, 0.2, leaf.shape).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, params)


def loss_and_gradient(settings: dict[str, Any], mesh: Any = None) -> tuple:
    """Of one step, as training takes it."""
    pin = (lambda hidden: hidden) if mesh is None else make_constrain(mesh)
    model = make_model(as_decoder_config(settings), constrain=pin, remat="none")
    loss, optimizer = make_loss("simpo"), keep_gradient()  # no reference to compile
    state = init_state(random_like(model.params), optimizer, loss)
    first, *others = make_examples()
    rows = [[first, others[0]], *([example] for example in others[1:])]
    batch, how = as_batch(rows, length=24, num_slots=2), {}
    if mesh is not None:
        shardings = as_shardings(state, mesh)
        state = jax.device_put(state, shardings)
        batch = jax.device_put(batch, rows_sharding(mesh))
        how = {"state_shardings": shardings, "rows_sharding": rows_sharding(mesh)}
    step = make_train_step(model.apply, loss, optimizer, **how)
    state, sums = step(state, None, batch)
    return summarize(sums)["loss"], state.opt_state


@cache
def on_one_device(case: str) -> tuple:
    return loss_and_gradient(CASES[case])


@pytest.mark.skipif(jax.device_count() != 4, reason="needs four virtual devices")
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(case: str, mesh: str):
    loss, gradient = on_one_device(case)
    found, sharded = loss_and_gradient(CASES[case], make_mesh(**MESHES[mesh]))
    assert found == pytest.approx(loss, rel=1e-5)
    whole = float(optax.tree.norm(gradient))
    for path, expected in jax.tree.leaves_with_path(gradient):
        ours = sharded
        for entry in path:
            ours = ours[entry.key]
        error = float(np.linalg.norm(np.asarray(ours) - expected))
        # Of GPT-2's key biases the gradient is 0 but for rounding.
        scale = max(float(np.linalg.norm(expected)), 1e-2 * whole)
        assert error < 1e-5 * scale, path
    embedding = sharded["embedding"]["embedding"]
    query = sharded["blocks"]["attention"]["query"]["kernel"]
    shapes = [part.sharding.shard_shape(part.shape) for part in (embedding, query)]
    outputs = query.shape[2]
    if mesh == "fsdp":
        assert shapes == [(41, 12), (2, 12, outputs)]
    else:
        assert shapes == [(41, 24), (2, 24, outputs // 2)]
