"""The choice of an attention kernel, and a whole model with one that is a kernel."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.batch import Batch
from dpojax.config import TrainConfig
from dpojax.data.packing import Example, as_batch
from dpojax.log_probs import completion_log_probs
from dpojax.losses.make import make_loss
from dpojax.models.attention import attention
from dpojax.models.decoder import make_model
from dpojax.models.flash import flash_attention
from dpojax.models.kernels import choose_kernel, make_attend
from dpojax.models.linear import Attend
from dpojax.models.shape import DecoderConfig
from dpojax.policy import load_policy
from dpojax.sharding import make_by_shard_and_head, make_mesh

CONFIG = DecoderConfig(
    vocabulary_size=64,
    width=32,
    num_layers=2,
    num_heads=4,
    num_key_heads=2,
    head_dimension=8,
    mlp_width=48,
    window=9,
    window_layers=(True, False),
    attention_cap=5.0,
)


def ragged() -> Batch:
    """Four rows of one or two examples with two completions, the last of one alone."""
    random = np.random.default_rng(0)

    def example(*lengths: int) -> Example:
        prompt, *completions = (random.integers(1, 64, n) for n in lengths)
        return Example(prompt, tuple(completions))

    rows = [
        [example(7, 9, 4), example(3, 2, 6)],
        [example(12, 11, 15)],
        [example(1, 5, 1), example(9, 3, 3)],
        [example(20, 2)],
    ]
    return as_batch(rows, length=40, num_slots=2)


def gradient(attend: Attend) -> jax.Array:
    model, batch = make_model(CONFIG, attend=attend), ragged()
    params = jax.jit(model.init)(jax.random.key(0))

    def total(params: dict) -> jax.Array:
        return jnp.sum(completion_log_probs(*model.apply(params, batch), batch))

    return jax.jit(jax.value_and_grad(total))(params)


@pytest.mark.parametrize("kernel", ["xla", "flash"])
def test_a_model_computes_with_any_kernel_what_it_does_with_all_scores(kernel: str):
    """Layers with and without a window, a soft cap, grouped queries, four devices."""
    if kernel == "flash":
        interpreted = partial(flash_attention, interpret=True, block=16)
        on_mesh = make_by_shard_and_head(make_mesh(1, 2, 2))

        def attend(*arrays: jax.Array, window, scale, cap) -> jax.Array:
            fixed = partial(interpreted, scale=scale, cap=cap)
            return on_mesh(fixed)(*arrays, window=window)
    else:
        attend = make_attend("xla")
    plain = gradient(attention)

    def close(found: jax.Array, wanted: jax.Array) -> None:
        largest = float(jnp.max(jnp.abs(wanted)))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * largest)

    jax.tree.map(close, gradient(attend), plain)


def test_a_kernel_of_another_machine_is_refused():
    assert choose_kernel("auto", 64) == choose_kernel("xla", 64) == "xla"
    with pytest.raises(ValueError, match="--attention flash needs a TPU, and this is"):
        choose_kernel("flash", 64)
    with pytest.raises(ValueError, match="--attention cudnn needs a GPU, and this is"):
        choose_kernel("cudnn", 64)


def test_a_kernel_of_another_machine_is_refused_before_weights_are_read(place: Path):
    """So it is where the weights cannot be read at all."""
    (place / "model" / "model.safetensors").unlink()
    config = TrainConfig(model=str(place / "model"), attention="flash")
    with pytest.raises(ValueError, match="--attention flash needs a TPU"):
        load_policy(config, make_loss("dpo"), make_mesh())
