"""Every case that TRL's and the DPO authors' own code computed, against our losses.

Where a definition differs by design, `of_…` says how one maps to the other: TRL 1.16
ignores label_smoothing for "sigmoid"; its simpo_gamma is gamma_beta_ratio times beta; a
loss without reference is one whose reference is 0; older names and orders are
translated. Here are the pairs of TRL 1.16 and KTO; `test_losses_oracle_others` has the
rest, and counts the cases, so that none can drop out.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.losses.make import Loss, make_loss
from dpojax.losses.scores import Scores

Hyper = dict[str, Any]
NAMES = {
    "sigmoid": "dpo",
    "robust": "robust_dpo",
    "sigmoid_norm": "dpo_norm",
    "aot_pair": "aot",
} | {
    name: name
    for name in (
        *("hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot"),
        *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
    )
}
SMOOTHED = ("robust", "exo_pair", "aot", "aot_pair", "aot_unpaired")
# Nothing that TRL computes is beyond us so far; a case that is goes here by its reason.
DO_NOT_APPLY: dict[str, int] = {}
COUNTS = {
    "dpo": 492,
    "dpo_legacy": 164,
    "kto": 144,
    "cpo": 68,
    "reference_repo": 36,
    "tpo_logits": 24,
    "cpo_logits": 17,
    "bco": 16,
    "orpo": 8,
    "reward": 8,
    "orpo_logits": 2,
}


class Oracle(NamedTuple):
    cases: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    input_sets: dict[str, dict[str, Any]]


class Result(NamedTuple):
    """Ours, each with a first axis of input sets."""

    loss: Any
    losses: Any
    rewards: tuple[Any, ...]
    of_policy: Any  # gradients with respect to the sums of log-probabilities
    of_prefix: Any


@pytest.fixture(scope="module")
def oracle(shared: Path) -> Oracle:
    read = json.loads((shared / "oracle" / "trl_losses.json").read_text())
    return Oracle(read["cases"], read["refused"], read["input_sets"])


def groups(oracle: Oracle, family: str) -> list[list[dict[str, Any]]]:
    """Cases that differ only in their numbers; they are evaluated together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in oracle.cases:
        if case["family"] == family:
            key = json.dumps([case["hyper"], case.get("label_pattern")])
            found.setdefault(key, []).append(case)
    return list(found.values())


def total(loss: Loss, candidates: Scores, weight: Any, running: Any) -> Any:
    """The mean, with token losses divided by all tokens; and the losses and rewards."""
    losses, rewards = jnp.zeros(len(candidates.policy), candidates.policy.dtype), ()
    outcomes = loss(candidates, running)
    for term in loss.terms:
        outcome = outcomes[term.name]
        losses += term.weight * outcome.loss
        if outcome.token_loss is not None:
            tokens = jnp.sum(candidates.length[:, 0])
            losses += term.weight * jnp.sum(outcome.token_loss) / tokens
        rewards = rewards or outcome.rewards
    losses *= weight
    return jnp.mean(losses), (losses, rewards)


def evaluate(
    loss: Loss, candidates: Scores, weight: Any = 1.0, running: Any = None
) -> Result:
    """Values and gradients of each input set."""

    def one(candidates: Scores, weight: jax.Array) -> Result:
        def of_sums(policy: jax.Array, prefix: jax.Array) -> Any:
            given = candidates._replace(policy=policy, policy_prefix=prefix)
            return total(loss, given, weight, running or {})

        (value, (losses, rewards)), grads = jax.value_and_grad(
            of_sums, argnums=(0, 1), has_aux=True
        )(candidates.policy, candidates.policy_prefix)
        return Result(value, losses, rewards, *grads)

    # A single set four times over: every operation is compiled for one shape only.
    four = jax.tree.map(lambda a: jnp.resize(a, (4, *a.shape[1:])), candidates)
    result = jax.vmap(one)(four, jnp.broadcast_to(weight, four.policy.shape[:2]))
    return jax.tree.map(np.asarray, result)


def two(*sides: Any) -> jax.Array:
    """The chosen and the rejected ones, on a last axis."""
    return jnp.stack([jnp.asarray(side) for side in sides], axis=-1)


def summed(inputs: dict[str, Any], name: str, by: str | None = None) -> np.ndarray:
    """Sums over completions ``[pairs, 2]``; over prefixes where `by` is "prefix"."""
    mask = np.array(inputs["completion_mask"])[:, 1:]
    if by == "prefix":
        shorter = np.minimum(*np.split(mask.sum(axis=1), 2))
        mask = mask * (np.cumsum(mask, axis=1) <= np.tile(shorter, 2)[:, None])
    return np.stack(np.split((np.array(inputs[name]) * mask).sum(axis=1), 2), axis=1)


def pairs(oracle: Oracle, sets: list[str], reference_free: bool = False) -> Scores:
    """The input sets ``[sets, pairs, 2]``, from their tokens."""

    def gather(name: str, by: str | None = None) -> jax.Array:
        return jnp.asarray(
            np.stack([summed(oracle.input_sets[one], name, by) for one in sets])
        )

    lengths = [
        np.stack([oracle.input_sets[one][f"{side}_lens"] for one in sets])
        for side in ("chosen", "rejected")
    ]
    free = 0.0 if reference_free else 1.0
    return Scores(
        gather("per_token_logps"),
        free * gather("ref_per_token_logps"),
        two(*lengths),
        policy_prefix=gather("per_token_logps", "prefix"),
        reference_prefix=free * gather("ref_per_token_logps", "prefix"),
        log_sum_squares=gather("log_sum_sq_probs"),
    )


def given(policy: jax.Array, length: Any = 1, score: Any = None) -> Scores:
    """Numbers without a reference, ``[sets, pairs, 2]``; an average has length 1."""
    return Scores(
        policy,
        jnp.zeros_like(policy),
        jnp.broadcast_to(jnp.asarray(length), policy.shape),
        score,
        policy_prefix=policy,
    )


def close(got: Any, wanted: Any, tolerance: float, what: Any) -> None:
    """Equal where TRL is finite; ours is finite everywhere."""
    got, wanted = np.asarray(got), np.asarray(wanted, float)
    assert np.all(np.isfinite(got)), what
    finite = np.isfinite(wanted)
    got, wanted = got[finite], wanted[finite]
    np.testing.assert_allclose(
        got, wanted, rtol=tolerance, atol=tolerance, err_msg=str(what)
    )


def compare(case: dict[str, Any], wanted: Hyper, got: Result, tolerance: float) -> None:
    """One input set's losses, rewards and gradients."""
    hyper = case["hyper"]
    what = (case["family"], case["input_set"], hyper)
    losses = got.losses
    if "aot" in str(hyper.get("loss_type")):  # TRL's are in the order of the quantiles
        losses = np.sort(losses)
        wanted = wanted | {"losses": sorted(wanted["losses"])}
    close(got.loss, wanted["loss"], tolerance, what)
    if wanted["losses"] is not None:
        close(losses, wanted["losses"], tolerance, what)
    if got.rewards:  # TRL reports some for sft as well
        close(got.rewards[0], wanted["chosen_rewards"], tolerance, what)
        close(got.rewards[1], wanted["rejected_rewards"], tolerance, what)
    grads = got.of_policy + got.of_prefix
    if wanted.get("grad_chosen_logps") is not None:
        close(grads[:, 0], wanted["grad_chosen_logps"], tolerance, what)
        close(grads[:, 1], wanted["grad_rejected_logps"], tolerance, what)


def row(result: Result, index: int) -> Result:
    return jax.tree.map(lambda array: array[index], result)


def of_dpo(hyper: Hyper) -> tuple[str, Hyper]:
    """The loss of TRL 1.16's DPOTrainer, as a name and settings of ours."""
    types = hyper["loss_type"]
    terms = [
        f"{weight}*{NAMES[name]}"
        for name, weight in zip(types, hyper["loss_weights"], strict=True)
    ]
    settings: Hyper = {} if types == ["sft"] else {"beta": hyper["beta"]}
    if types[0] in SMOOTHED:
        settings["label_smoothing"] = hyper["label_smoothing"]
    if types == ["discopop"]:
        settings["tau"] = hyper["discopop_tau"]
    divergence = hyper["f_divergence_type"]
    if divergence != "reverse_kl" and types != ["sft"]:  # which ignores it
        settings["divergence"] = divergence
    if settings.get("divergence") == "alpha_divergence":
        settings["divergence_alpha"] = hyper["f_alpha_divergence_coef"]
    if hyper["ld_alpha"] is not None:
        settings["ld_alpha"] = hyper["ld_alpha"]
    if hyper["use_weighting"]:
        settings["weighting"] = "aligned"
    return "+".join(terms), settings


def tolerance_of(hyper: Hyper) -> float:
    """Of float64; TRL computes a part of some losses in float32, one wholly."""
    if hyper["f_divergence_type"] == "alpha_divergence":
        return 2e-5
    return 1e-6 if "exo_pair" in hyper["loss_type"] else 1e-9


def check_tokens(oracle: Oracle, case: dict[str, Any], got: Result) -> None:
    """LD-DPO's gradients token by token: the prefix has one, the rest another."""
    mask = np.array(oracle.input_sets[case["input_set"]]["completion_mask"])[:, 1:]
    place = np.cumsum(mask, axis=1)
    shorter = np.tile(np.minimum(*np.split(mask.sum(axis=1), 2)), 2)[:, None]
    policy, prefix = (
        np.concatenate([grad[:, 0], grad[:, 1]])[:, None]
        for grad in (np.asarray(got.of_policy), np.asarray(got.of_prefix))
    )
    tokens = policy + prefix * (place <= shorter)
    # TRL's prefix goes on into the padding, which holds zeros.
    wanted = np.array(case["float64"]["grad_per_token"])
    close(mask * tokens, mask * wanted, 1e-9, case["hyper"])


def test_the_losses_of_pairs_equal_trl(oracle: Oracle):
    compared = 0
    with jax.enable_x64(True):
        for cases in groups(oracle, "dpo"):
            name, settings = of_dpo(cases[0]["hyper"])
            scores = pairs(oracle, [case["input_set"] for case in cases])
            result = evaluate(make_loss(name, **settings), scores)
            for index, case in enumerate(cases):
                got, compared = row(result, index), compared + 1
                tolerance = tolerance_of(case["hyper"])
                compare(case, case["float64"] or case, got, tolerance)
                if case["grad_per_token"] is not None:
                    check_tokens(oracle, case, got)
    assert compared == COUNTS["dpo"]


def test_kto_and_apo_zero_of_single_completions_equal_trl(oracle: Oracle):
    compared = 0
    with jax.enable_x64(True):
        for cases in groups(oracle, "kto"):
            scores = judged(oracle, [case["input_set"] for case in cases], cases[0])
            loss, weight = of_kto(cases[0]["hyper"], scores)
            result = evaluate(loss, scores, weight)
            for index, case in enumerate(cases):
                compare_judged(case, row(result, index))
                compared += 1
    assert compared == COUNTS["kto"]


def judged(oracle: Oracle, sets: list[str], case: dict[str, Any]) -> Scores:
    """Completions, the chosen ones of the sets, beside mismatched ones."""
    inputs = [oracle.input_sets[one] for one in sets]
    label = jnp.asarray(case["label"], float)

    def gather(*names: str) -> jax.Array:
        return two(*(np.stack([one[name] for one in inputs]) for name in names))

    policy = gather("chosen_logps", "kl_logps")
    return Scores(
        policy,
        gather("ref_chosen_logps", "kl_ref_logps"),
        gather("chosen_lens", "chosen_lens"),
        jnp.broadcast_to(label[:, None], policy.shape),
        policy_prefix=policy,
    )


def of_kto(hyper: Hyper, scores: Scores) -> tuple[Loss, Any]:
    """TRL weighs apo_zero_unpaired's labels too; those are weights of data here."""
    weights = {name: hyper[name] for name in ("desirable_weight", "undesirable_weight")}
    if hyper["loss_type"] == "kto":
        return make_loss("kto", beta=hyper["beta"], **weights), 1.0
    desirable, undesirable = weights.values()
    weight = jnp.where(scores.rating[..., 0] > 0.5, desirable, undesirable)
    return make_loss("apo_zero_unpaired", beta=hyper["beta"]), weight


def compare_judged(case: dict[str, Any], got: Result) -> None:
    """TRL lists the desirable ones first."""
    wanted, good = case["float64"], np.array(case["label"]) == 1
    close(got.loss, wanted["loss"], 1e-9, case["hyper"])
    losses = np.concatenate([got.losses[good], got.losses[~good]])
    close(losses, wanted["losses"], 1e-9, case["hyper"])
    close(got.rewards[0][good], wanted["chosen_rewards"], 1e-9, case["hyper"])
    close(got.rewards[0][~good], wanted["rejected_rewards"], 1e-9, case["hyper"])
    close(got.of_policy[:, 0], wanted["grad_logps"], 1e-9, case["hyper"])
    assert np.all(got.of_policy[:, 1] == 0)
