"""The reference's log-probabilities, computed once: what they equal, and what is kept.

Where only keys and files matter, a stand-in counts what would have been computed.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import keep_gradient

from dpojax import precompute as precompute_room
from dpojax.cli import main
from dpojax.command_config import EvalConfig, ReferenceConfig
from dpojax.commands import evaluate_policy
from dpojax.config import LoraConfig, LossConfig, MovingConfig, TrainConfig
from dpojax.data.packing import Example, as_batch, with_mismatched
from dpojax.losses.make import make_loss
from dpojax.metrics import summarize
from dpojax.models.decoder import DecoderConfig, Model, make_model
from dpojax.policy import load_policy
from dpojax.precompute import precompute, reference
from dpojax.prepare import load_split, make_configured_loss
from dpojax.reference import copy_params
from dpojax.reference_cache import Cache, find_cache, read_cache
from dpojax.reference_pass import fill_rows, make_reference_step, with_reference
from dpojax.run import Result, run
from dpojax.sharding import make_mesh, make_placement
from dpojax.train_step import init_state, make_train_step

SMALL = DecoderConfig(
    vocabulary_size=128,
    width=32,
    num_layers=2,
    num_heads=4,
    num_key_heads=2,
    head_dimension=8,
    mlp_width=64,
)


def random_examples(count: int, completions: int = 2, seed: int = 0) -> list[Example]:
    """Of different lengths, every third with tokens that are not scored."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(1, 128, rng.integers(low, high)).astype(np.int32)

    examples = []
    for number in range(count):
        some = tuple(tokens(3, 12) for _ in range(completions))
        masks = tuple(np.arange(len(one)) % 3 != 1 for one in some)
        masks = masks if number % 3 == 0 else None
        examples.append(Example(tokens(1, 9), some, masks=masks))
    return examples


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(SMALL)


@pytest.fixture(scope="module")
def two(model: Model) -> tuple[Any, Any]:
    """A policy and a reference."""
    init = jax.jit(model.init)
    return init(jax.random.key(0)), init(jax.random.key(1))


def precomputed(
    model: Model, params: Any, examples: list[Example], place: Path
) -> list[Example]:
    mesh = make_mesh()
    return with_reference(
        examples,
        make_reference_step(model.apply, mesh),
        lambda: params,
        find_cache(place, {}),
        num_rows=4,
        placement=make_placement(mesh),
    )


# -- The numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "parts"), [("dpo", 2), ("ld_dpo", 1), ("aot", 2), ("infonca", 1)]
)
def test_loss_and_gradients_are_those_of_the_reference_in_every_step(
    objective: str, parts: int, model: Model, two: tuple[Any, Any], tmp_path: Path
):
    policy, frozen = two
    loss = make_loss(objective)
    examples = random_examples(8, 3 if loss.kind == "ranked" else 2)
    step = make_train_step(model.apply, loss, keep_gradient(), num_microbatches=parts)

    def taken(some: list[Example], reference: Any) -> tuple[Any, dict[str, float]]:
        count = len(some[0].completions)
        batch = as_batch([[one] for one in some], length=64, num_completions=count)
        state, sums = step(
            init_state(copy_params(policy), keep_gradient()), reference, batch
        )
        return state.opt_state, summarize(sums)

    gradient, values = taken(precomputed(model, frozen, examples, tmp_path), None)
    wanted_gradient, wanted = taken(examples, frozen)
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(values[name], value, 1e-5, 1e-6, err_msg=name)
    for got, leaf in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True
    ):
        np.testing.assert_allclose(got, leaf, 1e-5, 1e-5 * np.abs(leaf).max())
