"""Losses that are others in a special case, and beta-DPO's choice of pairs."""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses import (
    anchored,
    batchwise,
    judged,
    likelihood,
    modifiers,
    pairs,
    ranked,
    reference_free,
    token_level,
)
from dpojax.losses.scores import Outcome, Scores

SIZE = 6


def draw(seed: int, **more: Any) -> Scores:
    random = np.random.default_rng(seed)
    policy, reference = random.uniform(-40, -1, (2, SIZE)).astype(np.float32)
    length = random.integers(1, 20, SIZE).astype(np.int32)
    given = Scores(jnp.asarray(policy), jnp.asarray(reference), jnp.asarray(length))
    return given._replace(**more)


W, L = draw(0), draw(1)
LIST = jax.tree.map(lambda *both: jnp.stack(both, axis=-1), W, L)
HARD = LIST._replace(score=jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (SIZE, 2)))


def same(one: Outcome, other: Outcome, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(one.loss, other.loss, rtol=tolerance, atol=1e-6)


def test_rankings_of_two_are_dpo():
    dpo = pairs.dpo(W, L, beta=0.1)
    same(ranked.plackett_luce(HARD, beta=0.1), dpo)
    same(ranked.infonca(HARD, beta=0.1, alpha=0.01), dpo)
    rewards = ranked.plackett_luce(HARD, beta=0.1).rewards[0]
    np.testing.assert_array_equal(rewards[:, 0], dpo.rewards[0])
    np.testing.assert_array_equal(rewards[:, 1], dpo.rewards[1])


def test_a_ranking_does_not_depend_on_the_order_of_its_completions():
    flipped = jax.tree.map(lambda array: array[:, ::-1], HARD)
    for loss in (ranked.plackett_luce, ranked.infonca, ranked.nca, ranked.exo):
        same(loss(HARD), loss(flipped))


def test_completions_that_tie_are_not_compared():
    tied = HARD._replace(score=jnp.ones((SIZE, 2)))
    assert np.all(np.abs(ranked.plackett_luce(tied).loss) < 1e-6)


@pytest.mark.parametrize("loss", ["plackett_luce", "infonca", "nca", "exo", "sppo"])
def test_a_shorter_list_is_a_list_without_what_is_absent(loss: str):
    shape = SIZE, 1
    longer = jax.tree.map(
        lambda array: jnp.concatenate([array, jnp.zeros(shape, array.dtype)], axis=1),
        HARD,
    )
    function = ranked.__dict__[loss]
    same(function(longer), function(HARD))


def test_nca_of_a_hard_pair_is_nca_pair():
    same(ranked.nca(HARD, beta=0.1), anchored.nca_pair(W, L, beta=0.1))


def test_exo_of_two_is_exo_pair_with_the_smoothing_that_its_scores_imply():
    """softmax((1, 0) / alpha) = (1 - e, e) for alpha = 1 / log((1 - e) / e)."""
    alpha = 1 / math.log(0.9 / 0.1)
    same(ranked.exo(HARD, alpha=alpha), pairs.exo_pair(W, L, label_smoothing=0.1))


def test_sppo_of_sure_wins_is_sppo_hard():
    same(ranked.sppo(HARD, beta=0.01), anchored.sppo_hard(W, L, beta=0.01))


def test_cal_dpo_is_half_of_sppo_hard_and_dpo_without_beta():
    half = anchored.sppo_hard(W, L, beta=0.01).loss / 2
    wanted = pairs.dpo(W, L, beta=1.0).loss + half
    got = anchored.cal_dpo(W, L, beta=0.01).loss
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_kto_about_zero_on_a_pair_is_apo_zero():
    """z0 is 0 where mismatched completions became less likely."""
    below = draw(2, policy=jnp.full(SIZE, -80.0))
    good, bad = (
        one._replace(score=jnp.full(SIZE, y)) for one, y in ((W, 1.0), (L, 0.0))
    )
    sums = [judged.kto(one, below).loss for one in (good, bad)]
    wanted = anchored.apo_zero(W, L).loss
    np.testing.assert_allclose(sums[0] + sums[1], wanted, rtol=1e-6)
    single = [judged.apo_zero_unpaired(one).loss for one in (good, bad)]
    np.testing.assert_allclose(single[0] + single[1], wanted, rtol=1e-6)


def test_bco_about_zero_on_a_pair_is_bco_pair():
    good, bad = (
        one._replace(score=jnp.full(SIZE, y)) for one, y in ((W, 1.0), (L, 0.0))
    )
    nothing = judged.initial_mean()
    total = judged.bco(good, nothing).loss + judged.bco(bad, nothing).loss
    np.testing.assert_allclose(total, anchored.bco_pair(W, L).loss, rtol=1e-6)


def test_npo_is_dpo_whose_chosen_completion_stays():
    still = W._replace(policy=W.reference)
    wanted = 2 / 0.1 * pairs.dpo(still, L, beta=0.1).loss
    np.testing.assert_allclose(likelihood.npo(L, beta=0.1).loss, wanted, rtol=1e-5)


def test_dpo_is_what_is_left_of_its_relatives():
    plain = pairs.dpo(W, L, beta=0.1)
    prefixed = [
        one._replace(policy_prefix=0.3 * one.policy, reference_prefix=0.6 * one.policy)
        for one in (W, L)
    ]
    same(modifiers.ld_dpo(*prefixed, beta=0.1, ld_alpha=1.0), plain)
    equal = [one._replace(token_kl=jnp.linspace(0, 7, SIZE)) for one in (W, L)]
    same(token_level.tdpo1(*equal, beta=0.1), plain)
    same(token_level.tdpo2(*equal, beta=0.1, alpha=0.7), plain)
    same(modifiers.f_dpo(W, L, beta=0.1, divergence="reverse_kl"), plain)
    weightless = [one._replace(log_sum_squares=one.policy) for one in (W, L)]
    same(modifiers.wpo(*weightless, beta=0.1), plain)
    same(pairs.step_dpo(W, L, beta=0.1), plain)
    same(pairs.robust_dpo(W, L, beta=0.1, label_smoothing=0.0), plain)
    same(pairs.dpop(W, L, beta=0.1, penalty=0.0), plain)
    same(pairs.r_dpo(W, L, beta=0.1, alpha=0.0), plain)
    by_one = [one._replace(score=jnp.full(SIZE, y)) for one, y in ((W, 2.0), (L, 1.0))]
    same(pairs.odpo(*by_one, beta=0.1), plain)
    alike = [one._replace(length=jnp.full(SIZE, 1, jnp.int32)) for one in (W, L)]
    same(pairs.dpo_norm(*alike, beta=0.1), plain)


def test_tdpo1_is_tdpo2_that_holds_the_chosen_kl_constant():
    kls = jnp.linspace(0.0, 7.0, SIZE), jnp.linspace(3.0, 1.0, SIZE)
    good, bad = W._replace(token_kl=kls[0]), L._replace(token_kl=kls[1])
    same(token_level.tdpo1(good, bad), token_level.tdpo2(good, bad, alpha=1.0))

    def gradient(loss: Any, **settings: float) -> jax.Array:
        return jax.grad(
            lambda kl: jnp.sum(loss(good._replace(token_kl=kl), bad, **settings).loss)
        )(kls[0])

    assert np.all(gradient(token_level.tdpo1) < 0)
    assert np.all(gradient(token_level.tdpo2, alpha=1.0) == 0)


@pytest.mark.parametrize("alpha", [1 - 1e-3, 1.0, 1 + 1e-3])
def test_the_alpha_divergence_tends_to_the_reverse_kl(alpha: float):
    changed = modifiers.f_dpo(
        *(W, L), beta=0.1, divergence="alpha_divergence", divergence_alpha=alpha
    )
    same(changed, pairs.dpo(W, L, beta=0.1), tolerance=0.0 if alpha == 1 else 0.1)


def test_the_alpha_divergence_of_0_is_the_forward_kl():
    forward = modifiers.f_divergence(W, divergence="forward_kl")
    alpha = modifiers.f_divergence(
        W, divergence="alpha_divergence", divergence_alpha=0.0
    )
    np.testing.assert_array_equal(forward.policy, alpha.policy)


@pytest.mark.parametrize(
    "divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
)
def test_a_divergence_is_the_log_ratio_where_policies_nearly_agree(divergence: Any):
    """f'(1) = 0, and f''(1) = 1 but for Jensen and Shannon's, which is 1/2."""
    log_ratio = jnp.asarray([0.0, 1e-4, -1e-4])
    near = Scores(log_ratio, jnp.zeros(3), jnp.ones(3, jnp.int32))
    seen = modifiers.f_divergence(near, divergence=divergence).log_ratio
    slope = 0.5 if divergence == "js_divergence" else 1.0
    np.testing.assert_allclose(seen, slope * log_ratio, atol=1e-7)


def test_the_gradient_of_a_divergence_keeps_its_digits_far_below_the_reference():
    """d/dx (1 - e^-x) = e^-x at x = 12.6, of which expm1 in float32 keeps two."""
    low = jnp.asarray(12.6)

    def of_policy(policy: jax.Array) -> jax.Array:
        one = Scores(policy, jnp.zeros(()), jnp.asarray(1))
        return modifiers.f_divergence(one, divergence="forward_kl").policy

    np.testing.assert_allclose(jax.grad(of_policy)(low), math.exp(-12.6), rtol=1e-5)


@pytest.mark.parametrize("flipped", [0.0, 0.1, 0.4])
def test_robust_dpo_is_unbiased_under_flipped_labels(flipped: float):
    right = pairs.robust_dpo(W, L, label_smoothing=flipped).loss
    wrong = pairs.robust_dpo(L, W, label_smoothing=flipped).loss
    expected = (1 - flipped) * right + flipped * wrong
    np.testing.assert_allclose(expected, pairs.dpo(W, L).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_conservative_dpo_rests_where_the_policy_believes_the_label_so_much(
    beta: float,
):
    """Its gradient is 0 at sigmoid(h) = 1 - e."""
    margin = jnp.log(0.9 / 0.1) / beta
    zero = jnp.zeros(())
    grad = jax.grad(
        lambda policy: (
            pairs.dpo(
                Scores(policy, zero, jnp.asarray(3)),
                Scores(zero, zero, jnp.asarray(3)),
                beta=beta,
                label_smoothing=0.1,
            ).loss
        )
    )(margin)
    np.testing.assert_allclose(grad, 0, atol=1e-7)


def test_simpo_is_what_is_left_of_its_relatives():
    simpo = reference_free.simpo(W, L, beta=2.0, gamma_beta_ratio=0.1)
    bent = reference_free.alphapo(W, L, beta=2.0, gamma_beta_ratio=0.1, alpha=1e-4)
    same(bent, simpo, tolerance=5e-3)
    both = reference_free.cpo_simpo(W, L, beta=2.0, gamma_beta_ratio=0.1)
    same(both, simpo, tolerance=0.0)
    no_reference = [one._replace(reference=jnp.zeros(SIZE)) for one in (W, L)]
    plain = reference_free.simpo(W, L, beta=5.0, gamma_beta_ratio=0.0)
    same(pairs.dpo_norm(*no_reference, beta=5.0), plain)
    same(pairs.dpo(*no_reference, beta=0.1), reference_free.cpo(W, L, beta=0.1))


def test_aot_of_one_pair_is_dpo():
    one = [jax.tree.map(lambda array: array[:1], score) for score in (W, L)]
    dpo = pairs.dpo(*one, beta=0.1, label_smoothing=0.2)
    for loss in (batchwise.aot, batchwise.aot_unpaired):
        same(loss(*one, beta=0.1, label_smoothing=0.2), dpo)


def running(mean: float, deviation: float, step: int = 0) -> batchwise.RunningMargin:
    return batchwise.RunningMargin(
        jnp.asarray(mean), jnp.asarray(deviation), jnp.asarray(step, jnp.int32)
    )


def margins(values: Any) -> tuple[Scores, Scores]:
    values = jnp.asarray(values, jnp.float32)
    length = jnp.full(values.shape, 3, jnp.int32)
    zero = jnp.zeros_like(values)
    return Scores(values, zero, length), Scores(zero, zero, length)


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_beta_dpo_keeps_exactly_its_share_of_the_pairs(rho: float):
    sizes = np.arange(1, 5000)
    exact = [math.floor((1 - Fraction(str(rho))) * int(size)) for size in sizes]
    for double in (False, True):
        with jax.enable_x64(double):
            kept = jax.vmap(lambda size: batchwise.num_kept(size, rho))
            counts = kept(jnp.asarray(sizes, jnp.int32))
        np.testing.assert_array_equal(counts, np.maximum(exact, 1))


def test_beta_dpo_averages_the_loss_of_the_pairs_that_it_keeps():
    chosen, rejected = margins(np.linspace(-1, 2, SIZE))
    outcome = batchwise.beta_dpo(chosen, rejected, running(0.5, 1.0), rho=0.3)
    kept = np.asarray(outcome.loss) > 0
    assert kept.sum() == 4
    difference = np.asarray(chosen.policy)[kept]
    assert outcome.logged is not None
    beta = outcome.logged["beta"]
    np.testing.assert_allclose(
        beta, 0.1 * (1 + 0.6 * (difference.mean() - 0.5)), rtol=1e-5
    )
    wanted = np.log1p(np.exp(-beta * difference)).mean()
    np.testing.assert_allclose(outcome.loss.mean(), wanted, rtol=1e-5)


def test_beta_dpo_leaves_out_what_lies_far_from_its_mean():
    """Ten deviations away a pair is as good as never drawn, at whatever step."""
    chosen, rejected = margins([0.0, 0.1, 10.0, -0.1, 0.2, -10.0])
    for step in range(20):
        loss = batchwise.beta_dpo(
            chosen, rejected, running(0.0, 1.0, step), rho=0.3
        ).loss
        np.testing.assert_array_equal(loss > 0, [1, 1, 0, 1, 1, 0])


def test_beta_dpo_draws_others_at_another_step():
    chosen, rejected = margins(np.linspace(-0.5, 0.5, SIZE))
    drawn = [
        np.asarray(
            batchwise.beta_dpo(chosen, rejected, running(0.0, 1.0, step), rho=0.5).loss
        )
        > 0
        for step in (0, 0, 1)
    ]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[1], drawn[2])


def test_the_beta_of_beta_dpo_has_no_gradient():
    chosen, rejected = margins([0.4, 0.9, 0.4, 0.9, 0.4, 0.9])

    def mean(policy: jax.Array) -> jax.Array:
        seen = chosen._replace(policy=policy)
        loss = batchwise.beta_dpo(seen, rejected, running(0.0, 1.0), rho=0.0).loss
        return jnp.mean(loss)

    beta = 0.1 * (1 + 0.6 * 0.65)
    wanted = -beta / (1 + np.exp(beta * np.array([0.4, 0.9] * 3))) / 6
    np.testing.assert_allclose(jax.grad(mean)(chosen.policy), wanted, rtol=1e-5)


def test_the_reference_point_of_kto_has_no_gradient():
    judged_one = W._replace(score=jnp.ones(SIZE))

    def total(policy: jax.Array) -> jax.Array:
        return jnp.sum(judged.kto(judged_one, L._replace(policy=policy)).loss)

    assert np.all(jax.grad(total)(L.policy) == 0)


def test_orpo_has_a_loss_and_a_gradient_where_a_completion_is_certain():
    """log(1 - p) has no value at p = 1, which counts as just below."""
    for log_p in (0.0, -1e-30, -1e-8):
        value, grad = jax.value_and_grad(reference_free.log1mexp)(jnp.asarray(log_p))
        np.testing.assert_allclose(value, math.log(2**-23), rtol=1e-5)
        assert np.isfinite(grad)


@pytest.mark.parametrize("log_p", [-1e-6, -0.01, -0.69, -0.7, -5.0, -80.0])
def test_log1mexp_is_exact_near_both_ends(log_p: float):
    wanted = (
        math.log(-math.expm1(log_p)) if log_p > -0.7 else math.log1p(-math.exp(log_p))
    )
    got, grad = jax.value_and_grad(reference_free.log1mexp)(jnp.asarray(log_p))
    np.testing.assert_allclose(got, wanted, rtol=2e-6)
    np.testing.assert_allclose(grad, -1 / math.expm1(-log_p), rtol=1e-5)
