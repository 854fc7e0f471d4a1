"""From a name and settings to a loss: sums, defaults, modifiers and refusals."""

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses.limits import LIMITS, limit_of
from dpojax.losses.make import (
    MODIFIERS,
    Setting,
    defaults_of,
    make_loss,
    split_terms,
)
from dpojax.losses.objective import Objective
from dpojax.losses.pairs import dpo
from dpojax.losses.scores import Outcome, Scores
from dpojax.losses.table import MIXTURES, OBJECTIVES

# Two pairs, of log-ratios (1.5, -2) and (-1, -4).
PAIRS = Scores(
    jnp.asarray([[-3.5, -9.0], [-7.0, -9.0]]),
    jnp.asarray([[-5.0, -7.0], [-6.0, -5.0]]),
    jnp.asarray([[4, 5], [3, 3]]),
    log_sum_squares=jnp.asarray([[-4.5, -8.0], [-6.0, -9.0]]),
    policy_prefix=jnp.asarray([[-3.5, -7.5], [-7.0, -9.0]]),
    reference_prefix=jnp.asarray([[-5.0, -6.0], [-6.0, -5.0]]),
)
DPO = np.log1p(np.exp(-0.1 * np.array([3.5, 3.0])))


def test_a_name_has_the_defaults_of_its_function():
    loss = make_loss("dpo")
    assert loss.name == "dpo" and loss.kind == "pair"
    assert loss.terms[0].settings == {"beta": 0.1, "label_smoothing": 0.0}
    assert loss.learning_rate == 1e-6 and not loss.batchwise
    assert loss.initial_running() == {}
    np.testing.assert_allclose(loss(PAIRS, {})["dpo"].loss, DPO, rtol=1e-6)


def test_a_setting_replaces_a_default():
    outcome = make_loss("dpo", beta=0.5)(PAIRS, {})["dpo"]
    np.testing.assert_allclose(outcome.loss, np.log1p(np.exp([-1.75, -1.5])), rtol=1e-6)
    np.testing.assert_allclose(outcome.rewards[0], [0.75, -0.5], rtol=1e-6)


def test_a_sum_has_an_outcome_and_a_weight_of_each_term():
    loss = make_loss("0.8*dpo + 2e-1*hinge+sft", beta=0.1)
    assert [term.weight for term in loss.terms] == [0.8, 0.2, 1.0]
    outcomes = loss(PAIRS, {})
    assert list(outcomes) == ["dpo", "hinge", "sft"]
    np.testing.assert_allclose(outcomes["dpo"].loss, DPO, rtol=1e-6)
    np.testing.assert_allclose(outcomes["hinge"].loss, [0.65, 0.7], rtol=1e-6)
    # sft beside a loss of pairs imitates the chosen one.
    token_loss = outcomes["sft"].token_loss
    assert token_loss is not None and token_loss.tolist() == [3.5, 7.0]


def test_a_setting_goes_to_every_term_that_has_it():
    loss = make_loss("dpo+hinge+sft", beta=0.3)
    assert [term.settings.get("beta") for term in loss.terms] == [0.3, 0.3, None]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dpo", [(1.0, "dpo")]),
        ("hinge+sft", [(1.0, "hinge"), (1.0, "sft")]),
        ("1e+1*dpo+1.E+2*sft", [(10.0, "dpo"), (100.0, "sft")]),
        ("1e-3*tdpo1+tdpo2", [(1e-3, "tdpo1"), (1.0, "tdpo2")]),
    ],
)
def test_sums_are_split_at_the_plus_between_terms(
    text: str, parts: list[tuple[float, str]]
):
    assert split_terms(text) == parts


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_its_terms_by_another_name(name: str):
    mixture = MIXTURES[name]
    by_name, written_out = make_loss(name), make_loss(mixture.terms, **mixture.settings)
    assert by_name.name == name and by_name.terms == written_out.terms
    assert make_loss(name, beta=0.7).terms[0].settings["beta"] == 0.7


def test_mpo_gives_one_beta_to_both_of_its_losses():
    assert [term.settings.get("beta") for term in make_loss("mpo").terms] == [
        0.1,
        0.1,
        None,
    ]


def test_what_runs_along_is_kept_by_the_name_of_the_term():
    judged = PAIRS._replace(score=jnp.asarray([[1.0, 0.0], [0.0, 0.0]]))
    loss = make_loss("bco", beta=0.1)
    assert loss.batchwise and loss.kind == "judged"
    running = loss.update_running(loss.initial_running(), judged)
    np.testing.assert_allclose(running["bco"].mean, (0.15 - 0.1) / 2, rtol=1e-6)
    logged = loss(judged, running)["bco"].logged
    assert logged is not None and logged["delta"] == running["bco"].mean
    margins = make_loss("beta_dpo+sft").initial_running()
    assert list(margins) == ["beta_dpo"]


def test_modifiers_are_the_losses_that_are_made_of_them():
    for modified, whole, settings in (
        ("dpo", "f_dpo", {"divergence": "js_divergence"}),
        ("dpo", "ld_dpo", {"ld_alpha": 0.25}),
        ("dpo", "wpo", {"weighting": "aligned", "beta": 0.2}),
        ("dpo", "wpo", {"weighting": "likelihood", "beta": 0.2}),
    ):
        first = make_loss(modified, **settings)
        second = make_loss(whole, **settings)
        ours, theirs = first(PAIRS, {})[modified], second(PAIRS, {})[whole]
        np.testing.assert_array_equal(ours.loss, theirs.loss)
        np.testing.assert_array_equal(ours.rewards, theirs.rewards)
        assert first.needs == second.needs


def test_modifiers_combine():
    """JS of desensitised scores, weighted by the policy as it is."""
    settings = {"ld_alpha": 0.5, "divergence": "js_divergence", "weighting": "aligned"}
    got = make_loss("dpo", **settings)(PAIRS, {})["dpo"]
    margin = 0.1 * np.log([(1 + np.exp(1.75)) / (1 + np.exp(-1.5)), 1.0])
    margin[1] = 0.1 * np.log((1 + np.exp(4)) / (1 + np.exp(1)))
    weight = np.exp([1 / 4 - 1 / 5, -1 / 3 - 0.0])
    np.testing.assert_allclose(got.loss, weight * np.log1p(np.exp(-margin)), rtol=1e-6)
    # The rewards are the reverse KL's, of the desensitised sums.
    np.testing.assert_allclose(got.rewards[1], [-0.175, -0.4], rtol=1e-6)


def test_what_is_needed_follows_the_settings():
    assert make_loss("dpo").needs == {"reference"}
    assert make_loss("simpo").needs == set()
    assert make_loss("mpo").needs == {"reference"}
    assert make_loss("dpo", ld_alpha=0.5).needs == {"reference", "prefix"}
    assert make_loss("simpo", weighting="aligned").needs == {"log_sum_squares"}
    assert make_loss("wpo").needs == {"reference", "log_sum_squares"}
    assert make_loss("wpo", weighting="likelihood").needs == {"reference"}
    assert make_loss("kto").needs == {"reference", "mismatched"}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("dpoo", {}, "no loss 'dpoo'; did you mean 'dpo'"),
    ("dpo+plackett", {}, "did you mean 'plackett_luce'"),
    ("", {}, "no loss ''"),
    ("0.5*rpo+sft", {}, r"'rpo' is a sum itself .* write out its terms, dpo\+0.005"),
    ("x*dpo", {}, "'x' in the loss 'x\\*dpo' is no positive weight"),
    ("0*dpo", {}, "no positive weight"),
    ("-1*dpo", {}, "no positive weight"),
    ("inf*dpo", {}, "no positive weight"),
    ("nan*dpo", {}, "no positive weight"),
    ("dpo+dpo", {}, "must differ"),
    ("dpo+kto", {}, "examples of one kind, and they take pair and judged"),
    ("kto+sft", {}, "only sft joins losses of pairs"),
    ("dpo+bradley_terry", {}, "all take rewards of a scalar head"),
    ("bradley_terry+sft", {}, "train a reward model by itself"),
    ("dpo", {"gamma": 1.0}, "no setting 'gamma'; it has beta, label_smoothing, div"),
    ("dpo", {"label_smooting": 0.1}, "did you mean 'label_smoothing'"),
    ("sft", {"beta": 0.1}, "no setting 'beta'; it has none"),
    ("dpo", {"divergence": "kl"}, "one of reverse_kl, forward_kl, js_divergence"),
    ("nca_pair", {"divergence": "forward_kl"}, "no setting 'divergence'"),
    ("plackett_luce", {"divergence": "forward_kl"}, "no setting 'divergence'"),
    ("dpo", {"divergence_alpha": 0.5}, "only with divergence alpha_divergence"),
    (
        *("dpo", {"divergence": "forward_kl", "divergence_alpha": 0.5}),
        "divergence_alpha has no effect on forward_kl",
    ),
    ("f_dpo", {"divergence_alpha": 0.5}, "no effect on js_divergence"),
    ("mpo", {"divergence": "js_divergence"}, "does not hold for bco_pair"),
    ("simpo", {"ld_alpha": 0.5}, "no setting 'ld_alpha'"),
    ("aot", {"ld_alpha": 0.5}, "no setting 'ld_alpha'"),
    ("aot", {"weighting": "aligned"}, "no setting 'weighting'"),
    ("beta_dpo", {"weighting": "aligned"}, "no setting 'weighting'"),
    ("bradley_terry", {"weighting": "aligned"}, "no setting 'weighting'"),
    ("dpo", {"weighting": "on"}, "weighting must be one of aligned, likelihood"),
    ("dpo", {"beta": 0.0}, "beta must be a positive number, not 0.0"),
    ("dpo", {"beta": float("nan")}, "not nan"),
    ("dpo", {"beta": "0.1"}, "beta must be a positive number"),
    ("dpo", {"beta": True}, "beta must be a positive number"),
    ("dpo", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
    ("exo_pair", {"label_smoothing": 0.0}, r"in \(0, 0.5\)"),
    ("alphapo", {"alpha": 0.0}, "not 0"),
    ("infonca", {"alpha": 0.0}, "alpha must be a positive number"),
    ("beta_dpo", {"rho": 1.0}, r"rho must be in \[0, 1\)"),
    ("dpo", {"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\]"),
    ("ipo", {"average": 1.0}, "average must be true or false"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(
    name: str, settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        make_loss(name, **settings)


SETTINGS = [(n, s) for n, o in OBJECTIVES.items() for s in defaults_of(o)]


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_every_setting_has_a_limit_and_a_default_within(name: str, setting: str):
    limit, default = limit_of(name, setting), defaults_of(OBJECTIVES[name])[setting]
    assert limit is not None and limit.allows(default)
    for wrong in (float("nan"), float("inf"), "anything"):
        assert not limit.allows(wrong)


def test_every_modifier_has_a_limit_and_no_limit_is_of_nothing():
    assert all(limit_of("dpo", name) is not None for name in MODIFIERS)
    used = {setting for _, setting in SETTINGS} | set(MODIFIERS)
    assert {name.rpartition(".")[2] for name in LIMITS} == used
    one = {name.partition(".")[0] for name in LIMITS if "." in name}
    assert one <= set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_of_the_table_is_made_with_its_defaults(name: str):
    loss, objective = make_loss(name), OBJECTIVES[name]
    assert loss.kind == objective.kind and loss.needs == set(objective.needs)
    assert loss.batchwise == objective.batchwise
    parameters = inspect.signature(objective.function).parameters.values()
    settings = [one for one in parameters if one.kind is one.KEYWORD_ONLY]
    assert all(one.default is not one.empty for one in settings)
    others = [one for one in parameters if one.kind is not one.KEYWORD_ONLY]
    num_scores = {"pair": 2, "single": 1, "judged": 1, "ranked": 1}[objective.kind]
    num_scores += "mismatched" in objective.needs
    assert len(others) == num_scores + (objective.running is not None)


def test_a_table_of_ones_own_is_taken_as_well():
    def offset(chosen: Scores, rejected: Scores, *, shift: float = 1.0) -> Outcome:
        return Outcome(dpo(chosen, rejected).loss + shift)

    table = {"offset": Objective(offset, "ls(h) + shift", "this test", cancels=True)}
    settings: dict[str, Setting] = {"shift": 2.0}
    outcome = make_loss("offset", table, **settings)(PAIRS, {})["offset"]
    np.testing.assert_allclose(outcome.loss, DPO + 2, rtol=1e-6)
    with pytest.raises(ValueError, match="did you mean 'offset'"):
        make_loss("ofset", table)
