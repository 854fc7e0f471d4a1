"""The other families of the oracle: without reference, reward models, older code.

How their definitions map to ours is said in `of_…` of each; the helpers are those of
`test_losses_oracle`, where the pairs of TRL 1.16 and KTO are.
"""

import json
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses_oracle import (
    COUNTS,
    DO_NOT_APPLY,
    NAMES,
    SMOOTHED,
    Hyper,
    Oracle,
    Result,
    close,
    compare,
    evaluate,
    given,
    groups,
    of_dpo,
    oracle,
    pairs,
    row,
    total,
    two,
)

from dpojax.losses.judged import initial_mean
from dpojax.losses.make import Loss, make_loss
from dpojax.losses.scores import Scores

__all__ = ["oracle"]  # a fixture


def of_legacy(hyper: Hyper) -> tuple[str, Hyper]:
    """TRL 0.24: sums in ipo, cDPO, unpaired AOT as aot_pair, orders 1 - a.

    The running mean that its bco_pair subtracts was held at 0 for these cases.
    """
    kind, settings = hyper["loss_type"], {"beta": hyper["beta"]}
    name = "aot_unpaired" if kind == "aot_pair" else NAMES[kind]
    if kind in (*SMOOTHED, "sigmoid"):
        settings["label_smoothing"] = hyper["label_smoothing"]
    if kind == "exo_pair" and not settings["label_smoothing"]:
        settings["label_smoothing"] = 1e-3  # as TRL replaces 0
    if kind == "ipo":
        settings["average"] = False
    if kind == "discopop":
        settings["tau"] = hyper["discopop_tau"]
    if hyper["f_divergence_type"] != "reverse_kl":
        settings["divergence"] = hyper["f_divergence_type"]
    if hyper["f_divergence_type"] == "alpha_divergence":
        settings["divergence_alpha"] = 1 - hyper["alpha_coef"]
    return name, settings


def with_true_rewards(
    oracle: Oracle, sets: list[str], hyper: Hyper, loss: Loss
) -> Result:
    """`reference_free` takes the reference for 0 in the loss, not in the rewards."""
    result = evaluate(loss, pairs(oracle, sets))
    if not hyper["reference_free"]:
        return result
    free = evaluate(loss, pairs(oracle, sets, reference_free=True))
    return free._replace(rewards=result.rewards)


def test_trl_before_its_rewrite_is_equalled(oracle: Oracle):
    compared = 0
    for cases in groups(oracle, "dpo_legacy"):
        hyper, sets = cases[0]["hyper"], [case["input_set"] for case in cases]
        assert hyper["running_mean"] == 0
        name, settings = of_legacy(hyper)
        result = with_true_rewards(oracle, sets, hyper, make_loss(name, **settings))
        for index, case in enumerate(cases):
            compare(case, case, row(result, index), 1e-5)
            compared += 1
    assert compared == COUNTS["dpo_legacy"]


def test_the_dpo_papers_own_code_is_equalled(oracle: Oracle):
    compared = 0
    with jax.enable_x64(True):
        for cases in groups(oracle, "reference_repo"):
            hyper, sets = cases[0]["hyper"], [case["input_set"] for case in cases]
            if hyper["ipo"]:  # of sums, and without smoothing
                loss = make_loss("ipo", beta=hyper["beta"], average=False)
            else:
                smoothing = {"label_smoothing": hyper["label_smoothing"]}
                loss = make_loss("dpo", beta=hyper["beta"], **smoothing)
            result = with_true_rewards(oracle, sets, hyper, loss)
            for index, case in enumerate(cases):
                compare(case, case["float64"], row(result, index), 1e-9)
                compared += 1
    assert compared == COUNTS["reference_repo"]


def of_cpo(hyper: Hyper) -> tuple[str, Hyper]:
    """The preference part; hinge and ipo without reference are those with one of 0."""
    beta, smoothing = hyper["beta"], hyper["label_smoothing"]
    ratio = hyper.get("simpo_gamma", hyper.get("tpo_l_gamma", 0.0)) / beta
    if hyper.get("alpha"):
        alpha = hyper["alpha"]
        return "alphapo", {"beta": beta, "gamma_beta_ratio": ratio, "alpha": alpha}
    simpo = {"beta": beta, "gamma_beta_ratio": ratio, "label_smoothing": smoothing}
    plain = {"beta": beta, "label_smoothing": smoothing}
    return {
        "sigmoid": ("dpo", plain),
        "hinge": ("hinge", {"beta": beta}),
        "ipo": ("ipo", {"beta": beta}),
        "simpo": ("simpo", simpo),
        "tpo-l": ("simpo", simpo),
    }[hyper["loss_type"]]


def test_cpo_simpo_and_alphapo_equal_trl(oracle: Oracle):
    """The recorded log-probabilities are sums or averages: an average has length 1."""
    compared = 0
    with jax.enable_x64(True):
        for cases in groups(oracle, "cpo"):
            wanted = [case["float64"] for case in cases]
            sides = ("policy_chosen_logps", "policy_rejected_logps")
            scores = given(two(*([one[side] for one in wanted] for side in sides)))
            name, settings = of_cpo(cases[0]["hyper"])
            result = evaluate(make_loss(name, **settings), scores)
            for index, case in enumerate(cases):
                compare(case, wanted[index], row(result, index), 1e-9)
                compared += 1
            if name == "dpo":
                check_cpo(settings, scores, result)
    assert compared == COUNTS["cpo"]


def check_cpo(settings: Hyper, scores: Scores, dpo: Result) -> None:
    """Our cpo is that part and the likelihood of the chosen ones."""
    cpo = evaluate(make_loss("cpo", **settings, alpha=2.0), scores)
    likelihood = -2 * np.mean(scores.policy[..., 0], axis=-1)
    np.testing.assert_allclose(cpo.loss, dpo.loss + likelihood, rtol=1e-12)


def completions(inputs: dict[str, Any], logits: jax.Array) -> tuple[jax.Array, ...]:
    """Sums and lengths ``[pairs, 2]`` of the labelled tokens, from the logits."""
    labels = np.concatenate([inputs["chosen_labels"], inputs["rejected_labels"]])[:, 1:]
    mask = labels != -100
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    taken = jnp.take_along_axis(
        log_probs, np.where(mask, labels, 0)[..., None], axis=-1
    )
    sums = jnp.sum(taken[..., 0] * mask, axis=-1)
    return two(*jnp.split(sums, 2)), two(*np.split(mask.sum(axis=-1), 2))


def from_logits(case: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """The whole loss of CPOTrainer, rewards, and the gradient of the logits."""
    hyper = case["hyper"]
    name, settings = of_cpo(hyper)
    name = {"dpo": "cpo"}.get(name, name)
    if name == "cpo":
        settings = settings | {"alpha": hyper["cpo_alpha"]}
    elif hyper["cpo_alpha"]:
        name += f"+{hyper['cpo_alpha']}*sft"

    def of_logits(logits: jax.Array) -> Any:
        scores = given(*completions(inputs, logits))
        return total(make_loss(name, **settings), scores, 1.0, {})

    return jax.value_and_grad(of_logits, has_aux=True)(jnp.asarray(inputs["logits"]))


def test_cpo_and_simpo_of_logits_with_their_likelihood_equal_trl(oracle: Oracle):
    inputs, compared = oracle.input_sets["logits"], 0
    for case in [one for one in oracle.cases if one["family"] == "cpo_logits"]:
        (value, (_, rewards)), grad = from_logits(case, inputs)
        close(value, case["loss"], 1e-5, case["hyper"])
        if case["hyper"]["loss_type"] != "ipo":  # its rewards are averages there
            for ours, theirs in zip(
                rewards, ("chosen_rewards", "rejected_rewards"), strict=True
            ):
                close(ours, case[theirs], 1e-5, case["hyper"])
        norm = np.sqrt(np.sum(np.asarray(grad) ** 2))
        close(norm, case["grad_logits_l2"], 1e-5, case["hyper"])
        compared += 1
    assert compared == COUNTS["cpo_logits"]


def test_the_preference_part_of_tpo_is_that_of_cpo_and_simpo(oracle: Oracle):
    """TPO's own part is the likelihood of a third completion, which sft has."""
    compared = 0
    for case in [one for one in oracle.cases if one["family"] == "tpo_logits"]:
        name, settings = of_cpo(case["hyper"])
        scores = given(two([case["chosen_logps"]], [case["rejected_logps"]]))
        got = row(evaluate(make_loss(name, **settings), scores), 0)
        close(got.losses, case["losses"], 1e-5, case["hyper"])
        close(got.rewards[0], case["chosen_rewards"], 1e-5, case["hyper"])
        close(got.rewards[1], case["rejected_rewards"], 1e-5, case["hyper"])
        likelihood = case["hyper"]["tpo_alpha"] * (case["nll_loss"] or 0.0)
        close(got.loss + likelihood, case["loss"], 1e-5, case["hyper"])
        compared += 1
    assert compared == COUNTS["tpo_logits"]


@pytest.mark.parametrize("family", ["orpo", "orpo_logits"])
def test_the_odds_ratios_of_orpo_equal_trl(oracle: Oracle, family: str):
    """TRL's losses have the other sign; its likelihood takes in the prompt."""
    prefix = "policy_" if family == "orpo" else ""
    cases = [one for one in oracle.cases if one["family"] == family]
    for case in cases:
        logps = (case[f"{prefix}{side}_logps"] for side in ("chosen", "rejected"))
        scores = given(two(*([one] for one in logps)))
        got = row(evaluate(make_loss("orpo", beta=case["hyper"]["beta"]), scores), 0)
        likelihood = -np.mean(scores.policy[..., 0])
        wanted = case | {"losses": [-one for one in case["losses"]]}
        wanted["loss"] = case["loss"] - case.get("nll_loss", 0.0)
        if family == "orpo":  # the likelihood of ours, which has length 1 here
            wanted["grad_chosen_logps"] = np.array(case["grad_chosen_logps"]) - 1 / 8
        got = got._replace(loss=got.loss - likelihood, losses=got.losses - likelihood)
        compare(case, wanted, got, 1e-6)
    assert len(cases) == COUNTS[family]


def test_reward_models_equal_trl(oracle: Oracle):
    cases = [one for one in oracle.cases if one["family"] == "reward"]
    for case in cases:
        hyper = case["hyper"]
        rewards = two([case["chosen_rewards"]], [case["rejected_rewards"]])
        score = None
        if hyper["margin"] is not None:
            score = two([hyper["margin"]], [[0.0] * len(hyper["margin"])])
        center = hyper["center_rewards_coefficient"] or 0.0
        scale = 0.0 if score is None else 1.0
        loss = make_loss("bradley_terry", center=center, margin_scale=scale)
        got = row(evaluate(loss, given(rewards, score=score)), 0)
        grads = np.split(np.array(case["grad_rewards"]), 2)
        sides = ("grad_chosen_logps", "grad_rejected_logps")
        compare(case, case | dict(zip(sides, grads, strict=True)), got, 1e-5)
    assert len(cases) == COUNTS["reward"]


def flat(scores: Scores) -> Scores:
    """Pairs ``[1, pairs, 2]`` as completions ``[1, 2 pairs, 1]``, chosen ones first."""
    label = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), scores.policy.shape)
    arrays = jax.tree.map(
        lambda array: jnp.swapaxes(array, 1, 2).reshape(1, -1, 1),
        scores._replace(score=label),
    )
    return arrays


def test_bco_and_its_running_mean_equal_trl(oracle: Oracle):
    """The mean is carried over the sets in their order; density ratios are weights."""
    compared = 0
    for cases in groups(oracle, "bco"):
        hyper, running = cases[0]["hyper"], {"bco": initial_mean()}
        loss = make_loss("bco", beta=hyper["beta"])
        for case in cases:
            assert case["running_step"] == cases.index(case)
            scores = flat(pairs(oracle, [case["input_set"]]))
            running = loss.update_running(running, jax.tree.map(lambda a: a[0], scores))
            close(running["bco"].mean, case["running"]["mean"], 1e-6, hyper)
            assert running["bco"].count == case["running"]["count"]
            got = row(evaluate(loss, scores, density_ratio(hyper), running), 0)
            compare_halves(case, got)
            compared += 1
    assert compared == COUNTS["bco"]


def density_ratio(hyper: Hyper) -> jax.Array:
    """The weights of the desirable completions, 1, and of the undesirable."""
    ratio = np.ones(8)
    if hyper["udm"]:
        probability = np.array(hyper["udm_prob_desirable"])
        limits = hyper["min_density_ratio"], hyper["max_density_ratio"]
        ratio = np.clip(probability / (1 - probability), *limits)
    return jnp.asarray(np.concatenate([np.ones(8), ratio]), jnp.float32)


def compare_halves(case: dict[str, Any], got: Result) -> None:
    close(got.loss, case["loss"], 1e-6, case["hyper"])
    close(got.losses, case["losses"], 1e-6, case["hyper"])
    halves = np.split(got.rewards[0], 2), np.split(got.of_policy[:, 0], 2)
    for (good, bad), name in zip(halves, ("{}_rewards", "grad_{}_logps"), strict=True):
        close(good, case[name.format("chosen")], 1e-6, case["hyper"])
        close(bad, case[name.format("rejected")], 1e-6, case["hyper"])


def test_no_case_of_the_oracle_is_left_out(oracle: Oracle):
    """Each family's test asserts that it compared as many as are counted here."""
    assert Counter(case["family"] for case in oracle.cases) == COUNTS
    assert sum(COUNTS.values()) + sum(DO_NOT_APPLY.values()) == 979


# What TRL refuses only because PyTorch cannot change a tensor in its place, or cannot
# with its own scalar of sft; nothing is wrong with the losses.
CANNOT_IN_PYTORCH = 3


def test_what_trl_refuses_is_refused(oracle: Oracle):
    allowed = []
    for case in oracle.refused:
        hyper = {
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "ld_alpha": None,
            "use_weighting": False,
            "discopop_tau": 0.05,
            "loss_weights": [1.0] * len(case["hyper"]["loss_type"]),
        } | case["hyper"]
        name, settings = of_dpo(hyper)
        if case.get("where") in ("forward", "backward"):
            allowed.append(json.dumps(hyper["loss_type"]))
            continue
        with pytest.raises(ValueError):
            make_loss(name, **settings)
    assert allowed == ['["hinge"]', '["sft"]', '["apo_zero", "sft"]']
    assert len(allowed) == CANNOT_IN_PYTORCH and len(oracle.refused) == 48
