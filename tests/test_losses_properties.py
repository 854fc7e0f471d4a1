"""What must hold for every row of the table, so that a new row is covered at once.

Exceptions are named with their reason, and tested to be exceptions. Batches are of six
examples everywhere, so that each loss and its gradient is compiled once.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses.make import Loss, make_loss
from dpojax.losses.scores import Scores
from dpojax.losses.table import OBJECTIVES

WITH_REFERENCE = [n for n, o in OBJECTIVES.items() if "reference" in o.needs]
# What beta_dpo draws depends on the place in the batch; with 0 it takes all.
SETTINGS: dict[str, dict[str, Any]] = {"beta_dpo": {"rho": 0.0}}
# Ratings from the best to the worst, as scores, margins and win probabilities.
RATINGS = {"pair": [3.0, 1.0], "ranked": [0.9, 0.5, 0.1], "single": [0.0]}


def num_completions(name: str) -> int:
    objective = OBJECTIVES[name]
    judged = 2 if "mismatched" in objective.needs else 1
    return {"pair": 2, "ranked": 3, "single": 1, "judged": judged}[objective.kind]


def candidates(name: str, policy: Any, reference: Any, length: Any) -> Scores:
    """Completions ``[batch, completions]`` with all that any loss asks for.

    NumPy's arrays, since building them is most of the time of these tests.
    """
    policy, reference = (np.asarray(a, np.float32) for a in (policy, reference))
    length = np.broadcast_to(np.asarray(length, np.int32), policy.shape)
    if OBJECTIVES[name].kind == "judged":  # in turns desirable and undesirable
        rating = (np.arange(len(policy)) % 2 == 0)[:, None]
    else:
        rating = np.asarray(RATINGS[OBJECTIVES[name].kind])
    arrays = {
        "policy": policy,
        "reference": reference,
        "score": np.broadcast_to(rating, policy.shape).astype(np.float32),
        "policy_prefix": 0.75 * policy,
        "reference_prefix": 0.75 * reference,
        "log_sum_squares": np.float32(-0.5) * length,
        "token_kl": np.float32(0.25) * length,
    }
    given: dict[str, Any] = {k: v.astype(np.float32) for k, v in arrays.items()}
    return Scores(**given | {"length": length})


def draw(name: str, seed: int = 0, length: Any = None) -> Scores:
    """Six examples of moderate numbers, as of completions of up to twenty tokens."""
    random, shape = np.random.default_rng(seed), (6, num_completions(name))
    policy, reference = random.uniform(-40, -1, (2, *shape))
    if length is None:
        length = random.integers(1, 20, shape)
    return candidates(name, policy, reference, length)


class Evaluation(NamedTuple):
    losses: jax.Array  # each example's loss and token loss
    rewards: tuple[jax.Array, ...]
    grads: jax.Array  # of the sum over examples that are there, [batch, completions]


@cache
def compiled(name: str) -> Callable[[Scores], Evaluation]:
    loss = make_loss(name, **SETTINGS.get(name, {}))

    def total(policy: jax.Array, scores: Scores) -> tuple[jax.Array, Any]:
        losses, rewards = losses_of(loss, scores._replace(policy=policy))
        return jnp.sum(losses), (losses, rewards)

    def evaluation(scores: Scores) -> Evaluation:
        (_, (losses, rewards)), grads = jax.value_and_grad(total, has_aux=True)(
            scores.policy, scores
        )
        return Evaluation(losses, rewards, grads)

    return jax.jit(evaluation)


def evaluate(name: str, scores: Scores) -> Evaluation:
    return jax.tree.map(np.asarray, compiled(name)(scores))


def losses_of(loss: Loss, scores: Scores) -> tuple[jax.Array, Any]:
    """Each example's loss; 0, as the caller has it, where there is none."""
    running = loss.update_running(loss.initial_running(), scores)
    (outcome,) = loss(scores, running).values()
    losses = outcome.loss
    if outcome.token_loss is not None:
        losses += outcome.token_loss
    return jnp.where(jnp.any(scores.present, axis=-1), losses, 0.0), outcome.rewards


EXTREMES = [-2e4, -1e4, 0.0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_rewards_and_gradients_are_finite_at_every_log_probability(name: str):
    """Log-ratios of -2e4, +-1e4, 0 and 2e4, of one token and of 8192, in float32."""
    count = num_completions(name)
    grid = np.stack(np.meshgrid(*[EXTREMES] * (2 * count))).reshape(2 * count, -1).T
    # All of pairs, 3^4; of lists of three some of 3^6.
    grid = np.random.default_rng(0).permutation(grid)
    for batch in np.resize(grid, (14, 6, 2 * count)):
        for length in (1, 8192, np.resize([1, 8192], count)):
            policy, reference = np.split(batch, 2, axis=1)
            got = evaluate(name, candidates(name, policy, reference, length))
            assert got.losses.dtype == got.grads.dtype == jnp.float32
            assert all(np.all(np.isfinite(array)) for array in jax.tree.leaves(got))


class Turn(NamedTuple):
    """Where a loss pulls the best completion down, and that it may."""

    reason: str
    turned: list[float]  # log-ratios where it does
    straight: list[float] = [0.0, 0.0, 0.0]  # log-ratios where it doesn't


TURNS = {
    "ipo": Turn("beyond its target, 5 per token", [100, -100]),
    "exo_pair": Turn("beyond its target, h = log 999", [50, -50]),
    "discopop": Turn("not convex: it rises before h = 0", [-1, 1], [10, -10]),
    "nca_pair": Turn("the likelihood of noise, from r = log 2", [100, 0]),
    "sppo_hard": Turn("beyond its target, 500 nats", [600, -600]),
    "apo_down": Turn("it lowers both, where h is decided", [0, -5]),
    "cal_dpo": Turn("beyond its target, 250 nats", [300, -300]),
    "nca": Turn("the likelihood of noise, from r = log 3", [200, 0, 0]),
    "exo": Turn("beyond the scores' distribution", [60, 0, -40]),
    "sppo": Turn("beyond its target, 400 nats", [500, 0, -500]),
}
FORGET = ("npo", "simnpo")


def check_direction(name: str, scores: Scores) -> None:
    """The best one's log-probability may rise and the worst one's fall, at no cost."""
    grads = evaluate(name, scores).grads
    kind = OBJECTIVES[name].kind
    if kind == "single":
        assert np.all(grads >= 0) if name in FORGET else np.all(grads <= 0)
    elif kind == "judged":
        assert np.all(grads[::2, 0] <= 0) and np.all(grads[1::2, 0] >= 0)
        assert np.all(grads[:, 1:] == 0)  # another prompt's completions
    else:
        assert np.all(grads[:, 0] <= 0) and np.all(grads[:, -1] >= 0)
    assert np.any(grads != 0)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in TURNS])
def test_a_loss_pulls_the_better_completion_up_and_the_worse_one_down(name: str):
    for seed in range(5):
        check_direction(name, draw(name, seed=seed))


@pytest.mark.parametrize("name", TURNS)
def test_a_loss_that_turns_does_so_where_its_paper_says(name: str):
    shape, turn = (6, num_completions(name)), TURNS[name]
    straight, turned = (
        candidates(name, np.broadcast_to(ratios[: shape[1]], shape), np.zeros(shape), 4)
        for ratios in (turn.straight, turn.turned)
    )
    if name != "apo_down":  # whose gradient is 0 there, of the chosen one alone
        check_direction(name, straight)
    assert np.all(evaluate(name, straight).grads[:, 0] <= 0), turn.reason
    assert np.all(evaluate(name, turned).grads[:, 0] > 0), turn.reason


# Where a constant cancels as well, and yet `cancels` does not allow f-divergences.
CANCELS_TOO = {
    "f_dpo": None,  # no: it does for the reverse KL alone
    "wpo": "a modifier itself: dpo takes a divergence and a weighting",
    "ld_dpo": "a modifier itself: dpo takes a divergence and ld_alpha",
    "tdpo1": "its KL is the forward one already",
    "tdpo2": "its KL is the forward one already",
    "aot": "sorts what policy and reference say of a pair, not ratios",
    "beta_dpo": "its running averages are of log-ratios",
    "plackett_luce": "modifiers are for pairs",
    "infonca": "modifiers are for pairs",
    "exo": "modifiers are for pairs",
}


def changes_with_a_constant(name: str, length: Any) -> bool:
    """Whether log Z, one number for all completions of a prompt, makes a difference."""
    scores = draw(name, length=length)
    shift = np.linspace(-3, 4, 6, dtype=np.float32)[:, None]
    assert scores.reference is not None and scores.reference_prefix is not None
    shifted = scores._replace(
        reference=scores.reference - shift,
        reference_prefix=scores.reference_prefix - shift,
    )
    before, after = evaluate(name, scores), evaluate(name, shifted)
    return not np.allclose(before.losses, after.losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_the_partition_function_cancels_where_the_table_says(name: str):
    cancels = OBJECTIVES[name].cancels or bool(CANCELS_TOO.get(name))
    assert changes_with_a_constant(name, 7) != cancels


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.cancels])
def test_it_cancels_in_averages_only_of_equal_lengths(name: str):
    assert changes_with_a_constant(name, [3, 9]) == OBJECTIVES[name].averages


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in WITH_REFERENCE])
def test_a_loss_without_reference_does_not_look_at_one(name: str):
    scores = draw(name)
    nothing = np.full_like(scores.policy, np.nan)
    without = scores._replace(reference=nothing, reference_prefix=nothing)
    jax.tree.map(
        np.testing.assert_array_equal, evaluate(name, scores), evaluate(name, without)
    )


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_equal_policies_earn_nothing(name: str):
    scores = draw(name)
    assert scores.reference is not None
    same = scores._replace(
        policy=scores.reference, policy_prefix=scores.reference_prefix
    )
    rewards = evaluate(name, same).rewards
    assert rewards and all(np.all(reward == 0) for reward in rewards)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rewards_are_one_array_for_each_completion_that_is_judged(name: str):
    rewards = evaluate(name, draw(name)).rewards
    kind = OBJECTIVES[name].kind
    shapes = {"pair": [(6,)] * 2, "judged": [(6,)], "ranked": [(6, 3)]}
    wanted = shapes.get(kind, [] if name == "sft" else [(6,)])
    assert [reward.shape for reward in rewards] == wanted


def with_absent(scores: Scores, junk: Any) -> Scores:
    """Two examples are gone; of lists of three one completion besides."""
    absent = np.zeros(scores.policy.shape, bool)
    absent[[1, 4]] = True
    if absent.shape[-1] == 3:
        absent[2, 1] = True
    fields: dict[str, Any] = {
        name: np.where(absent, np.float32(junk), array)
        for name, array in scores._asdict().items()
    }
    return Scores(**fields)._replace(
        length=np.where(absent, 0, scores.length).astype(np.int32)
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_an_absent_completion_holds_changes_nothing(name: str):
    scores = draw(name)
    zero = evaluate(name, with_absent(scores, 0.0))
    noise = np.random.default_rng(1).uniform(size=scores.policy.shape)
    for number in (-1e4, 1e4):
        junk = evaluate(name, with_absent(scores, number * noise))
        np.testing.assert_array_equal(zero.losses, junk.losses)
        np.testing.assert_array_equal(zero.grads, junk.grads)
    gone = with_absent(scores, 0.0).length == 0
    assert np.all(zero.grads[gone] == 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_table_says_whether_an_example_depends_on_the_others(name: str):
    scores, others = draw(name), draw(name, seed=1)
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:3], b[3:]]), scores, others)
    same = np.isclose(
        evaluate(name, scores).losses[:3], evaluate(name, mixed).losses[:3], rtol=1e-5
    )
    assert np.all(same) != OBJECTIVES[name].batchwise


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.batchwise])
def test_absent_examples_are_as_if_they_had_not_been_given(name: str):
    scores = with_absent(draw(name), 1e3)
    rows = np.array([0, 2, 3, 5])
    fewer = jax.tree.map(lambda array: array[rows], scores)
    loss = make_loss(name, **SETTINGS.get(name, {}))
    scores, fewer = jax.tree.map(jnp.asarray, (scores, fewer))
    (with_them, _), (without, _) = losses_of(loss, scores), losses_of(loss, fewer)
    np.testing.assert_allclose(with_them[rows], without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_examples_is_only_the_order_of_losses(name: str):
    scores, order = draw(name), np.array([3, 0, 5, 1, 4, 2])
    moved = evaluate(name, jax.tree.map(lambda array: array[order], scores))
    for got, wanted in zip(
        jax.tree.leaves(moved), jax.tree.leaves(evaluate(name, scores)), strict=True
    ):
        np.testing.assert_allclose(got, wanted[order], rtol=1e-5, atol=1e-5)


def as_rows(scores: Scores) -> Scores:
    return jax.tree.map(lambda array: array.reshape(2, 3, *array.shape[1:]), scores)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_takes_rows_of_slots(name: str):
    rows = jax.tree.map(jnp.asarray, as_rows(draw(name)))
    losses, rewards = jax.eval_shape(
        lambda rows: losses_of(make_loss(name), rows), rows
    )
    assert losses.shape == (2, 3)
    assert all(reward.shape[:2] == (2, 3) for reward in rewards)


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.batchwise])
def test_rows_of_slots_are_one_batch(name: str):
    loss, scores = make_loss(name), jax.tree.map(jnp.asarray, draw(name))
    (flat, rewards), (folded, folded_rewards) = (
        losses_of(loss, scores),
        losses_of(loss, as_rows(scores)),
    )
    np.testing.assert_allclose(folded.ravel(), flat, rtol=1e-5, atol=1e-6)
    for one, other in zip(folded_rewards, rewards, strict=True):
        np.testing.assert_allclose(one.ravel(), other, rtol=1e-5)
