"""The optimiser against torch's, and the schedules against Hugging Face's."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax.int8_adam import MEAN, SQUARE, Codes, decode, encode, scale_by_int8_adam
from dpojax.optimizer import (
    Moments,
    Name,
    Schedule,
    make_optimizer,
    make_schedule,
)
from dpojax.sharding import as_shardings, make_mesh

SHAPES = {
    "embedding": {"embedding": (5, 4)},
    "blocks": {
        "attention": {"query": {"kernel": (2, 4, 6), "bias": (2, 6)}},
        "mlp_norm": {"scale": (2, 4)},
    },
}
DECAYED = {"embedding", "kernel"}


def make_tree(seed: int, scale: float = 1.0) -> Any:
    random = np.random.default_rng(seed)

    def fill(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(scale * random.normal(size=shape), jnp.float32)

    return jax.tree.map(fill, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


# Global norms on both sides of the norm 1 that is clipped to.
GRADIENTS = [make_tree(i, scale) for i, scale in enumerate([1, 0.01, 30, 0.02, 0.05])]


def run_optax(optimizer: optax.GradientTransformation) -> list[np.ndarray]:
    params = make_tree(100)
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for gradients in GRADIENTS:
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def run_torch(
    name: Name, learning_rate: float, max_grad_norm: float, weight_decay: float
) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    leaves = jax.tree.leaves_with_path(make_tree(100))
    params = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for _, leaf in leaves]
    decays = [path[-1].key in DECAYED for path, _ in leaves]
    pairs = list(zip(params, decays, strict=True))
    groups = [
        {"params": [p for p, d in pairs if d], "weight_decay": weight_decay},
        {"params": [p for p, d in pairs if not d], "weight_decay": 0.0},
    ]
    optimizer = (
        torch.optim.AdamW(groups, lr=learning_rate, betas=(0.8, 0.95), eps=1e-6)
        if name == "adamw"
        else torch.optim.RMSprop(groups, lr=learning_rate, eps=1e-6)
    )
    for gradients in GRADIENTS:
        for param, gradient in zip(params, jax.tree.leaves(gradients), strict=True):
            param.grad = torch.tensor(np.array(gradient))
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
        optimizer.step()
    return [param.detach().numpy() for param in params]


@pytest.mark.parametrize(
    ("name", "max_grad_norm", "weight_decay"),
    [
        ("adamw", 1.0, 0.0),
        ("adamw", 1.0, 0.1),
        ("adamw", 0.0, 0.1),
        ("rmsprop", 1.0, 0.0),
        ("rmsprop", 0.0, 0.0),
    ],
)
def test_five_steps_equal_those_of_torch(
    name: Name, max_grad_norm: float, weight_decay: float
):
    betas: dict[str, Any] = {"beta1": 0.8, "beta2": 0.95} if name == "adamw" else {}
    optimizer = make_optimizer(
        name,
        optax.constant_schedule(0.02),
        max_grad_norm=max_grad_norm,
        weight_decay=weight_decay,
        epsilon=1e-6,
        **betas,
    )
    expected = run_torch(name, 0.02, max_grad_norm, weight_decay)
    for found, wanted in zip(run_optax(optimizer), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


class Trained(NamedTuple):
    """A linear model of noisy pairs after 40 steps on DPO's loss."""

    loss: float  # over all pairs; log 2 before the first step
    weights: jax.Array
    state: Any


@lru_cache
def train_pairs(name: Name, moments: Moments) -> Trained:
    """Each pair's margin is a product of 256 features, whose sizes differ by 1,000."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = 10 ** jax.random.uniform(keys[0], (256,), minval=-2.0, maxval=1.0)
    features = sizes * (0.3 + jax.random.normal(keys[1], (640, 256)))
    optimizer = make_optimizer(name, optax.constant_schedule(1e-3), moments=moments)

    def loss(weights: jax.Array, features: jax.Array) -> jax.Array:
        return -jnp.mean(jax.nn.log_sigmoid(0.1 * features @ weights[0]))

    def step(carry: tuple, batch: jax.Array) -> tuple[tuple, None]:
        weights, state = carry
        slopes = jax.grad(loss)(weights, batch)
        updates, state = optimizer.update(slopes, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    @jax.jit
    def train() -> tuple:
        start = jnp.zeros((1, 256))
        batches = features.reshape(40, 16, 256)
        carry, _ = jax.lax.scan(step, (start, optimizer.init(start)), batches)
        return loss(carry[0], features), *carry

    final, weights, state = train()
    return Trained(float(final), weights, state)


@pytest.mark.parametrize(
    ("name", "moments", "of_loss", "of_weights"),
    [
        ("adamw", "bfloat16", 0.02, 0.02),
        ("adamw", "int8", 0.02, 0.08),
        ("adafactor", "float32", 0.05, 0.1),
    ],
)
def test_forty_steps_of_a_leaner_optimiser_stay_near_those_of_float32_adamw(
    name: Name, moments: Moments, of_loss: float, of_weights: float
):
    """Bounds are shares of how far AdamW comes: of its drop in loss, of its weights."""
    found, exact = train_pairs(name, moments), train_pairs("adamw", "float32")
    drop = math.log(2) - exact.loss
    assert abs(found.loss - exact.loss) < of_loss * drop
    distance = jnp.linalg.norm(found.weights - exact.weights)
    assert distance < of_weights * jnp.linalg.norm(exact.weights)


def test_moments_are_kept_in_what_they_are_said_to_be():
    """Bytes of the states of 256 weights, without step counts."""

    def num_bytes(name: Name, moments: Moments) -> int:
        leaves = jax.tree.leaves(train_pairs(name, moments).state)
        return sum(leaf.nbytes for leaf in leaves if leaf.ndim)

    assert num_bytes("adamw", "float32") == 256 * (4 + 4)
    assert num_bytes("adamw", "bfloat16") == 256 * (2 + 4)
    assert num_bytes("adamw", "int8") == 256 * (1 + 1) + 4 + 4


def test_a_square_in_eight_bits_follows_changes_of_a_thousandth_a_step():
    """Rounded to the nearest code it would stay: codes are 9.5 % apart.

    The first of each block has a larger gradient, which is the scale.
    """
    rule, start = scale_by_int8_adam(), jnp.ones((4, 256))

    def step(state: Any, size: jax.Array) -> tuple[Any, None]:
        return rule.update((size * start).at[:, 0].set(100), state)[1], None

    @jax.jit
    def squares() -> jax.Array:
        sizes = jnp.where(jnp.arange(1000) < 500, 1.0, 2.0)
        state, _ = jax.lax.scan(step, rule.init(start), sizes)
        return decode(Codes(state.square, state.square_scale), SQUARE)

    exact = (1 - 0.999**500) * 0.999**500 + 4 * (1 - 0.999**500)
    np.testing.assert_allclose(jnp.mean(squares()[:, 1:]), exact, rtol=0.03)


@pytest.mark.parametrize("scheme", [MEAN, SQUARE])
def test_rounding_to_eight_bits_keeps_the_mean(scheme: Any):
    values = jnp.exp(2 * jax.random.normal(jax.random.key(0), (512,)))

    def rounded(key: jax.Array) -> jax.Array:
        return decode(encode(values, scheme, key), scheme)

    keys = jax.random.split(jax.random.key(1), 400)
    mean = jax.jit(lambda keys: jnp.mean(jax.vmap(rounded)(keys), axis=0))(keys)
    np.testing.assert_allclose(mean, values, rtol=0.03)


def test_moments_in_eight_bits_are_sharded_as_their_parameters():
    mesh = make_mesh(data=1, fsdp=2, tensor=2)
    params = {"up": {"kernel": jnp.zeros((2, 8, 1024))}}
    state = scale_by_int8_adam().init(params)
    where = as_shardings(state, mesh)
    expected = as_shardings(params, mesh)
    assert where.mean == where.square == expected
    assert where.mean_scale == where.square_scale == expected


def test_weight_decay_moves_matrices_and_nothing_else():
    """With a gradient of 0 a step is ``-learning rate * decay * weight``."""
    optimizer = make_optimizer(
        "adamw", optax.constant_schedule(0.5), weight_decay=0.1, max_grad_norm=0.0
    )
    params = make_tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(optimizer.update)
    updates, _ = update(zeros, optimizer.init(params), params)

    def compare(path: tuple, change: jax.Array, param: jax.Array) -> None:
        expected = -0.05 * param if path[-1].key in DECAYED else 0 * param
        np.testing.assert_allclose(change, expected, rtol=1e-6)

    jax.tree.map_with_path(compare, updates, params)


@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 20])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_equal_those_of_hugging_face_step_for_step(
    schedule: Schedule, warmup_steps: int
):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=20,
    )
    ours = make_schedule(
        schedule, learning_rate=3e-4, num_steps=20, warmup_steps=warmup_steps
    )
    for step in range(20):
        expected = theirs.get_last_lr()[0]
        assert float(np.asarray(ours(step))) == pytest.approx(
            expected, rel=1e-5, abs=1e-10
        )
        optimizer.step()
        theirs.step()


def test_the_schedule_by_hand():
    """Two steps of warm-up, then 8 on a line: 0, 1/2, 1, 7/8, ..., 1/8, 0."""
    ours = make_schedule("linear", learning_rate=1.0, num_steps=10, warmup_steps=2)
    found = [float(np.asarray(ours(step))) for step in range(11)]
    expected = [0, 1 / 2, *(i / 8 for i in range(8, -1, -1))]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up of 11 steps is longer .* of 10"):
        make_schedule("linear", learning_rate=1.0, num_steps=10, warmup_steps=11)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("rmsprop", {"weight_decay": 0.1}),
        ("rmsprop", {"beta2": 0.95}),
        ("rmsprop", {"moments": "bfloat16"}),
        ("adafactor", {"beta1": 0.8}),
        ("adafactor", {"epsilon": 1e-6}),
    ],
)
def test_an_optimiser_refuses_what_it_does_not_have(name: Name, setting: Any):
    with pytest.raises(ValueError, match=f"{name} has no {next(iter(setting))} here"):
        make_optimizer(name, optax.constant_schedule(1.0), **setting)


@pytest.mark.parametrize("setting", [{"max_grad_norm": -1.0}, {"beta2": 1.5}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]):
    with pytest.raises(ValueError, match="must"):
        make_optimizer("adamw", optax.constant_schedule(1.0), **setting)


def test_unknown_names_are_refused_with_those_there_are():
    unknown: Any = "lion"
    with pytest.raises(
        ValueError, match="no optimiser 'lion'; there are adamw, rmsprop, adaf"
    ):
        make_optimizer(unknown, optax.constant_schedule(1.0))
    with pytest.raises(ValueError, match="Moments cannot be kept as 'lion'; there are"):
        make_optimizer("adamw", optax.constant_schedule(1.0), moments=unknown)
    with pytest.raises(ValueError, match="no schedule 'lion'; there are constant, lin"):
        make_schedule(unknown, learning_rate=1.0, num_steps=2, warmup_steps=0)
