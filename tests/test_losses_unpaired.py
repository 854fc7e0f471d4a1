"""The losses of batches, single, judged and ranked completions by hand.

The notation is that of `test_losses`: rewards 0.15 and -0.2 at beta 0.1, s the sigmoid,
ls its logarithm. Together both files have every loss of the table.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import BETA, CASES, REWARDS, Case, L, W, check, scores

from dpojax.losses import batchwise, judged
from dpojax.losses.objective import Running
from dpojax.losses.table import OBJECTIVES


def running_margin(mean: float) -> batchwise.RunningMargin:
    return batchwise.RunningMargin(
        jnp.asarray(mean), jnp.asarray(1.0), jnp.asarray(7, jnp.int32)
    )


# Gaps of the policy 5.5 and 2, of the reference 2 and -6; log-ratios 1.5, -2 and 4, -4.
TWO_W = scores([-3.5, -4.0], [-5.0, -8.0], [4, 4])
TWO_L = scores([-9.0, -6.0], [-7.0, -2.0], [5, 5])
# The second log-ratio is -2, as of the mismatched completions whose mean is 1.
JUDGED = scores([-3.5, -9.0], [-5.0, -7.0], [4, 5], score=[1.0, 0.0])
MISMATCHED = scores([-3.0, -7.0], [-6.0, -6.0], [5, 4], score=[1.0, 0.0])
FOUR = scores([[4.0, -9.0, 1.0, -3.0]], [[0.0] * 4], [[5] * 4], score=[[9, 0, 7, 4.0]])
# The pair of the other cases as a list; its scores are 3 : 1 under a temperature of 1.
LIST = scores(
    [[-3.5, -9.0]], [[-5.0, -7.0]], [[4, 5]], score=[[math.log(3), math.log(1)]]
)

UNPAIRED = [
    Case(
        "aot",
        "policy (2, 5.5), reference (-6, 2), so 8 and 3.5; the first pair has 5.5",
        *((TWO_W, TWO_L), [0.533382, 0.371101], ([0.15, 0.4], [-0.2, -0.4])),
        settings=BETA,
    ),
    Case(
        "aot_unpaired",
        "(1.5, 4) less (-4, -2) is 5.5 and 6: -ls(0.55), -ls(0.6)",
        *((TWO_W, TWO_L), [0.455492, 0.437488], ([0.15, 0.4], [-0.2, -0.4])),
        settings=BETA,
    ),
    Case(
        "aot_unpaired",
        "0.9 * 0.455492 + 0.1 (0.455492 + 0.55), and the same of 0.437488 and 0.6",
        *((TWO_W, TWO_L), [0.510492, 0.497488], ([0.15, 0.4], [-0.2, -0.4])),
        settings={"beta": 0.1, "label_smoothing": 0.1},
    ),
    Case(
        "beta_dpo",
        "margins 3.5 and 8, none left out, M = 1: 0.1 (1 + 0.6 * 4.75) = 0.385; "
        "-ls(1.3475), -ls(3.08)",
        *((TWO_W, TWO_L), [0.231024, 0.044934], ([0.15, 0.4], [-0.2, -0.4])),
        settings={"rho": 0.0},
        running=running_margin(1.0),
    ),
    Case(
        "beta_dpo",
        "far below M = 40 beta is 0.001: -ls(0.0035), -ls(0.008)",
        *((TWO_W, TWO_L), [0.691399, 0.689155], ([0.15, 0.4], [-0.2, -0.4])),
        settings={"rho": 0.0},
        running=running_margin(40.0),
    ),
    Case("sft", "-(-3.5)", (W,), 0.0, (), 3.5),
    Case("npo", "-20 ls(-0.15) = 20 * 0.770957", (W,), 15.419141, (0.15,)),
    Case("npo", "-20 ls(0.2) = 20 * 0.598139", (L,), 11.962777, (-0.2,)),
    Case(
        "simnpo",
        "2.5 * -1.8 = -4.5, less a margin of 1: -0.8 ls(3.5)",
        *((L,), 0.023800, (-4.5,)),
        settings={"gamma": 1.0},
    ),
    Case(
        "kto",
        "z0 = (3 - 1) / 2: 1.33 s(0.1 - 0.15) = 1.33 * 0.487503, 0.5 s(-0.2 - 0.1)",
        *((JUDGED, MISMATCHED), [0.648378, 0.212779], ([0.15, -0.2],)),
        settings={"desirable_weight": 1.33, "undesirable_weight": 0.5},
    ),
    Case(
        "kto",
        "z0 = (1.5 - 2) / 2 counts as 0: s(-0.15), s(-0.2)",
        *((JUDGED, JUDGED), [0.462570, 0.450166], ([0.15, -0.2],)),
    ),
    Case(
        "apo_zero_unpaired",
        "s(-0.15), s(-0.2)",
        *((JUDGED,), [0.462570, 0.450166], ([0.15, -0.2],)),
    ),
    Case(
        "bco",
        "delta = -0.025, their mean: -ls(0.15 + 0.025), -ls(0.2 - 0.025)",
        *((JUDGED,), [0.609470, 0.609470], ([0.15, -0.2],)),
        settings=BETA,
        running=judged.RunningMean(jnp.asarray(-0.025), jnp.asarray(2.0)),
    ),
    Case(
        "plackett_luce",
        "rewards 0.4, 0.1, -0.3, -0.9 in their order: 0.920257 + 0.712067 + 0.437488, "
        "each log sum exp of what remains less the first",
        *((FOUR,), [2.069812], ([[0.4, -0.9, 0.1, -0.3]],)),
        settings=BETA,
    ),
    Case(
        "plackett_luce",
        "0.4 above a tie of 0.1 and -0.3: log(e^0.4 + e^0.1 + e^-0.3) - 0.4",
        (scores([[4.0, 1.0, -3.0]], [[0.0] * 3], [[5] * 3], score=[[2.0, 1, 1]]),),
        *([0.805316], ([[0.4, 0.1, -0.3]],)),
        settings=BETA,
    ),
    Case(
        "infonca",
        "targets 3/4 and 1/4: 0.75 (0.683382 - 0.15) + 0.25 (0.683382 + 0.2)",
        *((LIST,), [0.620882], ([REWARDS],)),
        settings={"beta": 0.1, "alpha": 1.0},
    ),
    Case(
        "nca",
        "0.75 * 0.620957 + 0.25 * 0.798139 + (0.770957 + 0.598139) / 2",
        *((LIST,), [1.349800], ([REWARDS],)),
        settings={"beta": 0.1, "alpha": 1.0},
    ),
    Case(
        "exo",
        "0.586618 (-0.533382 + 0.287682) + 0.413382 (-0.883382 + 1.386294), by s(0.35)",
        *((LIST,), [0.063763], ([REWARDS],)),
        settings={"alpha": 1.0},
    ),
    Case(
        "sppo",
        "(1.5 - 0.3 / 0.1)^2 + (-2 + 0.2 / 0.1)^2",
        (scores([[1.5, -2.0]], [[0.0, 0.0]], [[4, 5]], score=[[0.8, 0.3]]),),
        *([2.25], ([REWARDS],)),
        settings=BETA,
    ),
]


@pytest.mark.parametrize("case", UNPAIRED, ids=lambda case: case.name)
def test_a_loss_of_other_examples_is_what_its_formula_gives_by_hand(case: Case):
    check(case)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_of_the_table_has_a_case_by_hand(name: str):
    assert name in {case.name for case in [*CASES, *UNPAIRED]}


def test_kto_logs_its_reference_point():
    outcome = judged.kto(JUDGED, MISMATCHED)
    assert outcome.logged is not None and outcome.logged["kl"] == 1.0


def test_the_running_mean_of_bco_counts_every_reward_once():
    """Rewards 0.15 and -0.2, then 0.3 beside an absent one: mean 0.25 / 3."""
    first = judged.update_mean(judged.initial_mean(), JUDGED, beta=0.1)
    np.testing.assert_allclose(tuple(first), (-0.025, 2), atol=1e-7)
    more = scores([3.0, 50.0], [0.0, 0.0], [6, 0], score=[1.0, 1.0])
    second = judged.update_mean(first, more, beta=0.1)
    np.testing.assert_allclose(tuple(second), (0.25 / 3, 3), atol=1e-7)
    logged = judged.bco(JUDGED, second, beta=0.1).logged
    assert logged is not None and logged["delta"] == second.mean


def test_the_running_margin_of_beta_dpo_decays_by_a_tenth():
    """Margins 3.5 and 8: mean 5.75, deviation 4.5 / sqrt 2; from 0 and 1."""
    after = batchwise.update_margin(batchwise.initial_margin(), TWO_W, TWO_L)
    wanted = 0.575, 0.9 + 0.45 / math.sqrt(2), 1
    np.testing.assert_allclose(after, wanted, rtol=1e-6)


def test_what_runs_along_starts_from_nothing():
    table = {name: o.running for name, o in OBJECTIVES.items() if o.running is not None}
    assert table == {
        "bco": Running(judged.initial_mean, judged.update_mean),
        "beta_dpo": Running(batchwise.initial_margin, batchwise.update_margin),
    }
    assert judged.initial_mean() == (0, 0)
    assert batchwise.initial_margin() == (0, 1, 0)
