"""Moments and a reference in the host's memory: the same numbers, kept elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from dpojax.config import LoraConfig, TrainConfig
from dpojax.offloading import fetch_state, on_host, put_on_host
from dpojax.run import run
from dpojax.sharding import as_shardings, make_mesh

Params = dict[str, Any]


def test_an_offloaded_state_stays_on_the_host_and_changes_no_number():
    mesh = make_mesh(fsdp=2)
    params: Any = {"up": {"kernel": jnp.ones((2, 4, 8))}}
    plain = optax.adam(0.1)
    away = fetch_state(plain)
    shapes = jax.eval_shape(plain.init, params)
    where = on_host(as_shardings(shapes, mesh), shapes)
    state = jax.jit(away.init, out_shardings=where)(params)
    step = jax.jit(away.update, donate_argnums=1, out_shardings=(None, where))
    expected: Any
    expected, plain_state = plain.update(params, plain.init(params))
    updates, state = step(params, state)
    np.testing.assert_array_equal(updates["up"]["kernel"], expected["up"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, state, plain_state)
    kinds = {
        leaf.ndim > 0: leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)
    }
    assert kinds[True] == "pinned_host"
    assert kinds[False] != "pinned_host"  # a count is not worth the way


def test_arrays_put_on_the_host_are_copies():
    array = jnp.ones((4, 2))
    there = put_on_host({"kernel": array})["kernel"]
    array.delete()
    assert there.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(there, np.ones((4, 2)))


def test_a_run_that_offloads_equals_one_that_does_not_and_resumes(
    config: TrainConfig, place: Path
):
    short = replace(config, steps=2, save_every=1, evaluate_every=2, sample_prompts=0)
    plain = run(replace(short, output=str(place / "plain")))
    away = replace(
        short, output=str(place / "away"), offload=("optimizer", "reference")
    )
    run(replace(away, stop_after=1))
    resumed = run(replace(away, resume=True))
    first = load_file(plain.directory / "final" / "model.safetensors")
    second = load_file(resumed.directory / "final" / "model.safetensors")
    for name, array in first.items():
        np.testing.assert_allclose(second[name], array, atol=1e-6, err_msg=name)
    assert plain.last_evaluation["loss"] == pytest.approx(
        resumed.last_evaluation["loss"], rel=1e-5
    )


def test_a_base_that_the_policy_needs_is_not_offloaded(config: TrainConfig):
    with pytest.raises(ValueError, match="reference of adapters is their base"):
        run(replace(config, offload=("reference",), lora=LoraConfig(rank=2)))
