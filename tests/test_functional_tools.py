"""Gradients of single examples, and the experiments that are made of them."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from optax.contrib import differentially_private_aggregate
from tiny_models import SMALL, keep_gradient

from dpojax.batch import Batch
from dpojax.data.packing import Example, as_batch
from dpojax.losses.make import make_loss
from dpojax.losses.scores import Scores
from dpojax.measure import Params
from dpojax.models.decoder import Model, make_model
from dpojax.per_example import per_example_gradients
from dpojax.train_step import init_state, make_train_step

FOLDER = Path(__file__).parent.parent / "experiments" / "functional"
LIKED, DISLIKED = 5, 6


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def experiment(name: str) -> Any:
    return import_module(name)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(SMALL, remat="none")


@pytest.fixture(scope="module")
def params(model: Model) -> Params:
    return model.init(jax.random.key(0))


def pairs_of_tokens(count: int, model: Model, params: Params) -> Batch:
    """Random tokens; the chosen have a liked one, the rejected a disliked one."""
    rng = np.random.default_rng(0)

    def tokens(count: Any, *among: int) -> np.ndarray:
        drawn = [*rng.integers(10, 128, count - len(among)), *among]
        return rng.permutation(drawn).astype(np.int32)

    examples = [
        Example(
            tokens(rng.integers(2, 5)),
            (tokens(rng.integers(3, 7), LIKED), tokens(rng.integers(3, 7), DISLIKED)),
        )
        for _ in range(count)
    ]
    batch = as_batch([[example] for example in examples], length=16)
    known = experiment("setting").log_probs(model.apply, params, batch)
    return batch._replace(reference=np.asarray(known)[:, None])


@pytest.fixture(scope="module")
def pairs(model: Model, params: Params) -> Batch:
    return pairs_of_tokens(64, model, params)


@pytest.fixture(scope="module")
def moved(params: Params) -> Params:
    """A policy that is not its reference."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        leaf + 0.05 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def first_rows(pairs: Batch, count: int) -> Batch:
    return experiment("setting").take(pairs, slice(count))


def largest_difference(one: Params, other: Params) -> float:
    differences = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), one, other)
    return float(max(jax.tree.leaves(differences)))


@pytest.fixture(scope="module")
def gradients(model: Model) -> Callable[[Params, Batch], Params]:
    take = partial(per_example_gradients, model.apply, make_loss("dpo"))
    return jax.jit(lambda params, batch: take(params, None, batch))


@pytest.fixture(scope="module")
def of_step(model: Model) -> Callable[[Params, Batch], Params]:
    """What the train step gives its optimiser."""
    optimizer = keep_gradient()
    step = make_train_step(model.apply, make_loss("dpo"), optimizer)

    def gradient(params: Params, batch: Batch) -> Params:
        state = init_state(jax.tree.map(jnp.copy, params), optimizer)
        return step(state, None, batch)[0].opt_state

    return gradient


def weighted(batch: Batch, weight: list[float]) -> Batch:
    return batch._replace(weight=np.array(weight, np.float32)[:, None])


def test_weighted_gradients_of_examples_average_to_the_gradient_of_the_step(
    moved: Params, pairs: Batch, gradients: Any, of_step: Any
) -> None:
    weight = [1, 2, 0.5, 1, 3, 0, 1, 2]
    batch = weighted(first_rows(pairs, 8), weight)
    grads = gradients(moved, batch)
    share = np.array(weight) / sum(weight)
    mean = jax.tree.map(lambda grad: jnp.tensordot(share, grad, axes=1), grads)
    assert largest_difference(mean, of_step(moved, batch)) < 1e-6
    assert not any(np.any(leaf[5]) for leaf in jax.tree.leaves(grads))


def test_what_has_no_gradient_of_its_own_is_refused(
    model: Model, params: Params, pairs: Batch
) -> None:
    batch = first_rows(pairs, 2)
    with pytest.raises(ValueError, match="depends on other examples"):
        per_example_gradients(model.apply, make_loss("aot"), params, None, batch)
    ones = np.ones(2, np.int32)
    two = as_batch([[Example(ones, (ones, ones))] * 2], length=16, num_slots=2)
    with pytest.raises(ValueError, match="one example a row"):
        per_example_gradients(model.apply, make_loss("dpo"), params, None, two)


def test_clipping_of_all_examples_at_once_is_that_of_one_after_another(
    moved: Params, pairs: Batch, gradients: Any, of_step: Any
) -> None:
    """One after another: the train step, with all but one row empty."""
    batch, clip = first_rows(pairs, 8), 2.0
    aggregate = differentially_private_aggregate(clip, 0.0, jax.random.key(0))
    grads = gradients(moved, batch)
    together, _ = aggregate.update(grads, aggregate.init(moved))
    norms, clipped = [], []
    for row in range(8):
        own = of_step(moved, weighted(batch, [float(row == r) for r in range(8)]))
        norms.append(float(optax.tree.norm(own)))
        clipped.append(optax.tree.scale(min(1.0, clip / norms[-1]), own))
    assert min(norms) < clip < max(norms)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 8, *clipped)
    assert largest_difference(together, mean) < 1e-6


def test_poisson_sampling_takes_each_pair_by_its_own_coin() -> None:
    pytest.importorskip("dp_accounting")
    order = experiment("private").poisson(400, 0.1, 200, seed=0)
    sizes = (order >= 0).sum(axis=1)
    assert sizes.max() <= order.shape[1] < sizes.max() + 32
    assert abs(sizes.mean() - 40) < 4 * 6 / np.sqrt(200)
    assert 0.7 < sizes.var() / 36 < 1.4  # a fixed size would have none
    assert all(len(set(step[step >= 0])) == (step >= 0).sum() for step in order)


def test_a_row_without_a_pair_counts_nothing(pairs: Batch) -> None:
    pytest.importorskip("dp_accounting")
    rows = experiment("private").taken(pairs, jnp.array([3, -1]))
    assert rows.weight.tolist() == [[1.0], [0.0]]
    np.testing.assert_array_equal(rows.tokens[0], pairs.tokens[3])


def test_the_accountant_knows_the_sampling_and_agrees_with_another() -> None:
    """Renyi divergences bound epsilon from above; a lost distribution is tighter."""
    accounting = pytest.importorskip("dp_accounting")
    private = experiment("private")
    whole = accounting.get_epsilon_gaussian(1.0, private.DELTA)  # of one full step
    bound = accounting.rdp.RdpAccountant().compose(private.event(1.0))
    found = private.epsilon(1.0)
    assert 0.5 * bound.get_epsilon(private.DELTA) < found < whole
    assert found < bound.get_epsilon(private.DELTA)


def test_the_noise_scale_is_that_of_gradients_with_known_moments() -> None:
    """Mean (3, 4), variances 2 and 3: tr(Sigma) / |G|^2 is 5 / 25."""
    rng = np.random.default_rng(0)
    drawn = rng.normal([3, 4], np.sqrt([2, 3]), (4_000, 2))
    noise = experiment("noise_scale").noise_of_sums(
        {"w": jnp.asarray(drawn.sum(axis=0))}, jnp.asarray(np.sum(drawn**2)), 4_000
    )
    assert float(noise.scale) == pytest.approx(0.2, rel=0.05)
    assert float(noise.variance) == pytest.approx(drawn.var(axis=0, ddof=1).sum(), 1e-4)


def test_influence_finds_flipped_pairs(
    model: Model, moved: Params, pairs: Batch
) -> None:
    setting, influence = experiment("setting"), experiment("influence")
    is_flipped = np.random.default_rng(1).random(64) < 0.2
    train = setting.flip(pairs, is_flipped)
    project = influence.make_projection(model.apply, moved)
    helped = influence.influence(
        project(moved, train),
        project(moved, pairs),
        setting.margins(model.apply, moved, train),
    )
    assert influence.auc(-helped, is_flipped) > 0.9


def test_projected_gradients_keep_their_products(
    model: Model, moved: Params, pairs: Batch, gradients: Any
) -> None:
    """Of dpo's gradients too: those of margins times beta sigmoid(-beta margin)."""
    setting, influence = experiment("setting"), experiment("influence")
    project = influence.make_projection(model.apply, moved)
    few = first_rows(pairs, 8)
    flat = jax.vmap(lambda grad: ravel_pytree(grad)[0])(gradients(moved, few))
    slope = 0.1 * jax.nn.sigmoid(-0.1 * setting.margins(model.apply, moved, few))
    projected = project(moved, pairs)[:8] * slope[:, None]
    exact, found = flat @ flat.T, projected @ projected.T
    np.testing.assert_allclose(found, exact, atol=0.1 * float(jnp.max(exact)))


def test_flipped_pairs_have_the_opposite_margin(
    model: Model, moved: Params, pairs: Batch
) -> None:
    setting = experiment("setting")
    where = np.arange(64) % 3 == 0
    plain = np.asarray(setting.margins(model.apply, moved, pairs))
    other = np.asarray(setting.margins(model.apply, moved, setting.flip(pairs, where)))
    np.testing.assert_allclose(other, np.where(where, -plain, plain), atol=2e-5)


def test_the_derivative_by_beta_through_training_is_a_finite_difference(
    model: Model, params: Params, pairs: Batch
) -> None:
    sensitivity = experiment("sensitivity")
    order = experiment("setting").shuffled(64, 8, 4, seed=0)
    tools = model.apply, optax.sgd(0.05, momentum=0.9), 0.1
    data = params, pairs, order, first_rows(pairs, 16)
    found = sensitivity.sensitivity(*tools, *data)
    difference = sensitivity.finite_difference(*tools, *data)
    assert float(found.whole) == pytest.approx(difference, rel=0.01)
    assert abs(float(found.by_training)) > 0.01


def test_the_gradient_of_coefficients_is_a_finite_difference(
    model: Model, moved: Params, pairs: Batch
) -> None:
    """Of SGD: Adam's first steps hardly depend on the size of a gradient."""
    discovered, order = experiment("discovered"), np.arange(32).reshape(4, 8)
    optimizer = optax.sgd(0.05, momentum=0.9)

    def outer(coefficients: np.ndarray) -> tuple[Any, Any]:
        return discovered.outer_gradient(
            model.apply,
            optimizer,
            jnp.asarray(coefficients),
            moved,
            pairs,
            pairs,
            order,
        )

    point = np.array([1.0, -0.2, 0.3, 0.1, 0.2])
    direction = np.array([0.1, 0.3, -0.4, 0.5, 0.2])
    above, below = (outer(point + sign * 0.05 * direction)[0] for sign in (1, -1))
    expected = direction @ np.asarray(outer(point)[1])
    assert float(above - below) / 0.1 == pytest.approx(expected, rel=0.02)
    assert abs(expected) > 0.01


def test_the_discovered_loss_starts_as_dpo() -> None:
    discovered, rng = experiment("discovered"), np.random.default_rng(0)
    policy, reference = rng.normal(-20, 5, (2, 3, 2)).astype(np.float32)
    scores = Scores(jnp.asarray(policy), jnp.asarray(reference), jnp.full((3, 2), 9))
    ours = discovered.make_discovered(discovered.DPO)(scores, {})["discovered"]
    theirs = make_loss("dpo")(scores, {})["dpo"]
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-6)
