"""The losses of pairs by hand: each number derived beside it, from the formula alone.

`W` and `L` are the chosen and the rejected completion of most cases: log-ratios 1.5 and
-2, so that at beta 0.1 the rewards are 0.15 and -0.2 and their margin h is 0.35. s is
the sigmoid and ls its logarithm, so -ls(x) = log(1 + e^-x). The other kinds of examples
are in `test_losses_unpaired`, which also asks that every loss of the table has a case.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses.scores import Scores
from dpojax.losses.table import OBJECTIVES


class Case(NamedTuple):
    """A loss of the table on given numbers, and what comes of it."""

    name: str
    derivation: str
    scores: tuple[Scores, ...]
    loss: Any
    rewards: tuple[Any, ...]
    token_loss: Any = None
    settings: dict[str, Any] = {}
    running: Any = None


def scores(policy: Any, reference: Any = 0.0, length: Any = 4, **more: Any) -> Scores:
    arrays = {name: jnp.asarray(value) for name, value in more.items()}
    return Scores(
        jnp.asarray(policy),
        None if reference is None else jnp.asarray(reference),
        jnp.asarray(length),
        **arrays,
    )


def check(case: Case) -> None:
    running = () if case.running is None else (case.running,)
    function = OBJECTIVES[case.name].function
    outcome = function(*case.scores, *running, **case.settings)
    got: tuple[Any, ...] = (outcome.loss, *outcome.rewards)
    wanted = (case.loss, *case.rewards)
    if case.token_loss is None:
        assert outcome.token_loss is None
    else:
        got, wanted = (*got, outcome.token_loss), (*wanted, case.token_loss)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=1e-6)


# Means -0.875 and -1.8 per token; the rejected one's fifth token is beyond the prefix.
W = scores(
    *(-3.5, -5.0, 4),
    score=3.0,
    policy_prefix=-3.5,
    reference_prefix=-5.0,
    log_sum_squares=-4.5,
    token_kl=0.6,
)
L = scores(
    *(-9.0, -7.0, 5),
    score=1.0,
    policy_prefix=-7.5,
    reference_prefix=-6.0,
    log_sum_squares=-8.0,
    token_kl=1.1,
)
REWARDS = (0.15, -0.2)
BETA = {"beta": 0.1}

CASES = [
    Case("dpo", "log(1 + e^-0.35) = log 1.704688", (W, L), 0.533382, REWARDS),
    Case(
        *("dpo", "0.9 * 0.533382 + 0.1 * (0.533382 + 0.35)", (W, L), 0.568382),
        REWARDS,
        settings={"label_smoothing": 0.1},
    ),
    Case(
        *("step_dpo", "0.4 * 3.5 = 1.4; log(1 + e^-1.4)", (W, L), 0.220417),
        rewards=(0.6, -0.8),
    ),
    Case(
        *("robust_dpo", "(0.9 * 0.533382 - 0.1 * 0.883382) / 0.8", (W, L), 0.489632),
        rewards=REWARDS,
    ),
    Case("ipo", "(1.5/4 + 2/5 - 5)^2 = 4.225^2", (W, L), 17.850625, REWARDS),
    Case(
        *("ipo", "(1.5 + 2 - 5)^2", (W, L), 2.25, REWARDS),
        settings={"average": False},
    ),
    Case("hinge", "1 - 0.35", (W, L), 0.65, REWARDS, settings=BETA),
    Case("hinge", "1 - 0.05 * 3.5", (W, L), 0.825, (0.075, -0.1)),
    Case(
        "hinge",
        "0 beyond the margin: 3.5 > 1",
        (W, L),
        0,
        (1.5, -2),
        None,
        {"beta": 1.0},
    ),
    Case(
        "exo_pair",
        "s(h) = 0.586618: 0.586618 (-0.533382 + 0.001001) + 0.413382 (-0.883382 "
        "+ 6.907755)",
        *((W, L), 2.178066, REWARDS),
    ),
    Case(
        "discopop",
        "m = s(0.35 / 0.05) = s(7) = 0.999089; 0.000911 * 0.533382 + 0.999089 e^-0.35",
        *((W, L), 0.704532, REWARDS),
        settings=BETA,
    ),
    Case(
        "discopop",
        "beta 0.05: m = s(3.5) = 0.970688; 0.029312 * 0.609470 + 0.970688 e^-0.175",
        *((W, L), 0.832716, (0.075, -0.1)),
    ),
    Case(
        *("dpo_norm", "5 (0.375 + 0.4) = 3.875; log(1 + e^-3.875)", (W, L), 0.020542),
        rewards=(7.5, -10.0),
    ),
    Case(
        "f_dpo",
        "JS: ls(1.5) - ls(-2) = -0.201413 + 2.126928; -ls(0.192551)",
        *((W, L), 0.601499, REWARDS),
    ),
    Case(
        "f_dpo",
        "forward: -e^-1.5 + e^2 = -0.223130 + 7.389056; -ls(0.716593)",
        *((W, L), 0.397711, REWARDS),
        settings={"divergence": "forward_kl"},
    ),
    Case(
        "f_dpo",
        "alpha 1/2: -2 e^-0.75 + 2 e^1 = -0.944733 + 5.436564; -ls(0.449183)",
        *((W, L), 0.493567, REWARDS),
        settings={"divergence": "alpha_divergence"},
    ),
    Case("r_dpo", "-ls(0.35 + 0.05 (4 - 5)) = -ls(0.3)", (W, L), 0.554355, REWARDS),
    Case(
        "ld_dpo",
        "the rejected one's log-ratio: prefix -1.5, rest -0.5, so -1.75; -ls(0.325)",
        *((W, L), 0.543793, (0.15, -0.175)),
    ),
    Case(
        "wpo",
        "weights e^(1/4) e^(-1/5) = e^0.05 = 1.051271, times -ls(0.035) = 0.675800",
        *((W, L), 0.710449, (0.015, -0.02)),
    ),
    Case(
        "wpo",
        "likelihood: e^-0.875 e^-1.8 = 0.068907, times 0.675800",
        *((W, L), 0.046567, (0.015, -0.02)),
        settings={"weighting": "likelihood"},
    ),
    Case("odpo", "-ls(0.35 - log(3 - 1)) = -ls(-0.343147)", (W, L), 0.879368, REWARDS),
    Case(
        "dpop",
        "log-ratios -1 and -4: h = 0.3, penalty 0.1 * 50 * 1; -ls(-4.7)",
        *((scores(-1.0), scores(-4.0)), 4.709054, (-0.1, -0.4)),
        settings=BETA,
    ),
    Case(
        "dpop",
        "no penalty while the chosen one rises: beta 0.3; -ls(1.05)",
        *((W, L), 0.300058, (0.45, -0.6)),
    ),
    Case("tdpo1", "-ls(0.35 - 0.1 (1.1 - 0.6)) = -ls(0.3)", (W, L), 0.554355, REWARDS),
    Case("tdpo2", "half of that: -ls(0.35 - 0.025)", (W, L), 0.543793, REWARDS),
    Case(
        "nca_pair",
        "-ls(0.15) + (-ls(-0.15) - ls(0.2)) / 2 = 0.620957 + (0.770957 + 0.598139) / 2",
        *((W, L), 1.305505, REWARDS),
        settings=BETA,
    ),
    Case(
        "bco_pair",
        "-ls(0.15) - ls(0.2) = 0.620957 + 0.598139",
        *((W, L), 1.219096, REWARDS),
        settings=BETA,
    ),
    Case(
        "sppo_hard",
        "(1.5 - 5)^2 + (-2 + 5)^2 = 12.25 + 9",
        *((W, L), 21.25, REWARDS),
        settings=BETA,
    ),
    Case("sppo_hard", "498.5^2 + 498^2", (W, L), 496506.25, (0.0015, -0.002)),
    Case(
        *("apo_zero", "s(-0.15) + s(-0.2) = 0.462570 + 0.450166", (W, L), 0.912736),
        rewards=REWARDS,
    ),
    Case(
        *("apo_down", "s(0.15) + s(-0.35) = 0.537430 + 0.413382", (W, L), 0.950812),
        rewards=REWARDS,
    ),
    Case(
        "cal_dpo",
        "-ls(3.5) + (3.5^2 + 3^2) / 2 = 0.029750 + 10.625",
        *((W, L), 10.654750, REWARDS),
        settings=BETA,
    ),
    Case(
        "simpo",
        "2 (-0.875 + 1.8 - 0.5) = 0.85; -ls(0.85)",
        *((W, L), 0.355865, (-1.75, -3.6)),
    ),
    Case(
        "cpo",
        "0.1 (-3.5 + 9) = 0.55; -ls(0.55)",
        *((W, L), 0.455492, (-0.35, -0.9)),
        token_loss=3.5,
    ),
    Case(
        "cpo_simpo",
        "SimPO's, and half of -log pi(chosen)",
        *((W, L), 0.355865, (-1.75, -3.6), 1.75),
        settings={"alpha": 0.5},
    ),
    Case(
        "alphapo",
        "10 (1 - e^0.21875) = -2.445201, 10 (1 - e^0.45) = -5.683122; less 0.25: "
        "-ls(2.987921)",
        *((W, L), 0.049164, (-2.445201, -5.683122)),
    ),
    Case(
        "orpo",
        "p = 0.416862 and 0.165299, odds 0.714860 and 0.198034, ratio e^1.283650; "
        "-0.1 ls(1.283650)",
        *((W, L), 0.024453, (-0.0875, -0.18), 3.5),
    ),
    Case(
        "slic_hf",
        "max(0, 6 + 3.5 - 9) + 3.5",
        *((W, L), 4.0, (-3.5, -9.0)),
        settings={"delta": 6.0},
    ),
    Case("slic_hf", "max(0, 1 - 5.5) + 3.5", (W, L), 3.5, (-3.5, -9.0)),
    Case("rrhf", "in order: 0 + 3.5", (W, L), 3.5, (-0.875, -1.8)),
    Case("rrhf", "the other way: (1.8 - 0.875) + 9", (L, W), 9.925, (-1.8, -0.875)),
    Case("unlikelihood", "3.5 - 0.1 * 9", (W, L), 2.6, (-3.5, -9.0)),
    Case(
        "bradley_terry",
        "rewards 1.5 and -2, no scores: -ls(3.5) + 0.01 * 0.5^2",
        *((scores(1.5, None), scores(-2.0, None)), 0.032250, (1.5, -2.0)),
        settings={"center": 0.01},
    ),
    Case(
        "bradley_terry",
        "margin 3 - 1.5 of the scores: -ls(3.5 - 1.5) = log(1 + e^-2)",
        (scores(1.5, None, score=3.0), scores(-2.0, None, score=1.5)),
        *(0.126928, (1.5, -2.0)),
        settings={"margin_scale": 1.0},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_loss_of_pairs_is_what_its_formula_gives_by_hand(case: Case):
    check(case)


# At the first step the policy is the reference, and every loss is a known number.
AT_THE_FIRST_STEP = {
    "dpo": 0.693147,
    "robust_dpo": 0.693147,
    "dpo_norm": 0.693147,
    "step_dpo": 0.693147,
    "hinge": 1.0,
    "ipo": 25.0,
    "nca_pair": 1.386294,
    "bco_pair": 1.386294,
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.846574,
    "exo_pair": 2.761231,
    "cal_dpo": 25.693147,
    "aot": 0.693147,
    "aot_unpaired": 0.693147,
}


@pytest.mark.parametrize("name", AT_THE_FIRST_STEP)
def test_a_loss_begins_where_it_must(name: str):
    same = scores([-40.0, -3.0], [-40.0, -3.0], [7, 4])
    outcome = OBJECTIVES[name].function(same, same, beta=0.1)
    np.testing.assert_allclose(outcome.loss, AT_THE_FIRST_STEP[name], rtol=1e-6)
    assert np.all(outcome.rewards[0] == 0) and np.all(outcome.rewards[1] == 0)


BARE = scores([1.0, 2.0], None, [3, 3])
WITHOUT = BARE._replace(reference=BARE.policy)


@pytest.mark.parametrize(
    ("name", "score", "message"),
    [
        ("dpo", BARE, "the reference's log-probabilities"),
        ("simpo", BARE, None),
        ("ld_dpo", BARE, "the reference's log-probabilities"),
        ("ld_dpo", WITHOUT, "log-probabilities of prefixes"),
        ("wpo", WITHOUT, "the sums of squared probabilities"),
        ("odpo", WITHOUT, "the annotators' scores or labels"),
        ("tdpo1", WITHOUT, "the KL of every token to the reference"),
        ("tdpo2", WITHOUT, "the KL of every token to the reference"),
    ],
)
def test_what_a_loss_needs_and_was_not_given_is_named(
    name: str, score: Scores, message: str | None
):
    function = OBJECTIVES[name].function
    if message is None:
        assert np.all(np.isfinite(function(score, score).loss))
    else:
        with pytest.raises(ValueError, match=f"needs {message} and was given none"):
            function(score, score)
