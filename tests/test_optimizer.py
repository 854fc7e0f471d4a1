"""The optimiser against torch's, and the schedules against Hugging Face's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax.optimizer import Name, Schedule, make_optimizer, make_schedule

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
    optimizer = make_optimizer(
        name,
        optax.constant_schedule(0.02),
        max_grad_norm=max_grad_norm,
        weight_decay=weight_decay,
        epsilon=1e-6,
        **({"beta1": 0.8, "beta2": 0.95} if name == "adamw" else {}),
    )
    expected = run_torch(name, 0.02, max_grad_norm, weight_decay)
    for found, wanted in zip(run_optax(optimizer), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("setting", [{"weight_decay": 0.1}, {"beta2": 0.95}])
def test_rmsprop_refuses_what_it_does_not_have(setting: dict[str, float]):
    with pytest.raises(ValueError, match="RMSprop has no weight decay and no beta1"):
        make_optimizer("rmsprop", optax.constant_schedule(1.0), **setting)


@pytest.mark.parametrize("setting", [{"max_grad_norm": -1.0}, {"beta2": 1.5}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]):
    with pytest.raises(ValueError, match="must"):
        make_optimizer("adamw", optax.constant_schedule(1.0), **setting)


def test_unknown_names_are_refused_with_those_there_are():
    unknown: Any = "lion"
    with pytest.raises(
        ValueError, match="no optimiser 'lion'; there are adamw, rmsprop"
    ):
        make_optimizer(unknown, optax.constant_schedule(1.0))
    with pytest.raises(ValueError, match="no schedule 'lion'; there are constant, lin"):
        make_schedule(unknown, learning_rate=1.0, num_steps=2, warmup_steps=0)
