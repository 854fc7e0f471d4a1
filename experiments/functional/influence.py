"""Which pairs harm? Influence of single pairs on a held-out margin, from gradients.

Claim: of training pairs of which 20 % have flipped labels, those that the influence
function finds to lower the margin of clean held-out pairs are the flipped ones (AUC
above 0.8); removing the worst 5 % of all raises the held-out accuracy, by little.
Command: python experiments/functional/influence.py --output runs/functional
Hardware, time and result: there.

A pair's influence is what its presence changes in the mean margin of the held-out
pairs, to first order and with a Gauss-Newton matrix for the Hessian (Koh and Liang
2017, arXiv:1703.04730, eq. 2; of margins and random projections, as in TRAK, Park et
al. 2023, arXiv:2303.14186, eq. 13-17):

    I(z) = p(z) <g, (Phi^T Phi / n + damping)^-1 phi(z)>

phi(z) is the projected gradient of the margin of z, Phi has those of the n training
pairs, g is the mean of those of the held-out ones, and ``p = sigmoid(-beta margin)`` is
how much dpo still wants of z. All are taken where the run starts: before it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from jax.flatten_util import ravel_pytree
from scipy.stats import mannwhitneyu
from setting import (
    Setting,
    Training,
    accuracy,
    in_parts,
    load_setting,
    make_run_optimizer,
    make_split,
    make_training,
    margins,
    markdown,
    mean_and_error,
    shuffled,
)

from dpojax.batch import Batch
from dpojax.losses.make import Loss, make_loss
from dpojax.losses.objective import Objective
from dpojax.losses.scores import Outcome, Scores
from dpojax.measure import Apply, Params
from dpojax.per_example import per_example_gradients
from dpojax.train_step import init_state

NUM_TRAIN, NUM_VALIDATION, FLIPPED = 896, 256, 0.2
BATCH_SIZE, BETA = 16, 0.1
NUM_STEPS = 56
NUM_SUMS = 8_192  # numbers that a gradient is projected to
DAMPING = 1.0  # in units of the mean eigenvalue of Phi Phi^T / n
REMOVED = 0.05


class Tools(NamedTuple):
    """Compiled once for all seeds."""

    apply: Apply
    optimizer: optax.GradientTransformation
    training: Training
    project: Callable[[Params, Batch], Array]

    def train(self, start: Params, pairs: Batch, order: np.ndarray) -> Params:
        """The parameters after a whole run."""
        return self.training(init_state(start, self.optimizer), pairs, order).params


def main(output: Path, seeds: int = 6) -> None:
    """Prints how well flipped pairs are found, and what their removal changes.

    Args:
      output: directory of the embedded task, made where it is not there.
      seeds: divisions of the pairs, flips and orders.
    """
    setting = load_setting(output)
    optimizer = make_run_optimizer(NUM_STEPS)
    tools = make_tools(setting.model.model.apply, setting.model.params, optimizer)
    results = [of_seed(setting, tools, seed) for seed in range(seeds)]
    print(tables(results))


def make_tools(
    apply: Apply, params: Params, optimizer: optax.GradientTransformation
) -> Tools:
    """Training by dpo, and projections of a margin's gradients.

    Args:
      apply: the model.
      params: any of its parameters; their number is what counts.
      optimizer: of the runs.
    """
    training = make_training(apply, make_loss("dpo"), optimizer)
    return Tools(apply, optimizer, training, make_projection(apply, params))


def make_projection(apply: Apply, params: Params) -> Callable[[Params, Batch], Array]:
    """Builds ``(params, pairs) -> [pairs, sums]``: gradients of margins, in few sums.

    Each number of a gradient enters one sum, which one and with which sign being drawn
    once: products of gradients are kept on the average.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    rng = np.random.default_rng(0)
    padded = -(-size // NUM_SUMS) * NUM_SUMS
    places, signs = rng.permutation(padded), rng.choice([-1.0, 1.0], padded)
    signs = jnp.asarray(signs, jnp.float32)

    def of_part(params: Params, part: Batch) -> Array:
        grads = per_example_gradients(apply, minus_margin(), params, None, part)
        flat = jax.vmap(lambda grad: ravel_pytree(grad)[0])(grads)
        filled = jnp.pad(-flat, ((0, 0), (0, padded - size)))
        mixed = filled[:, places] * signs
        return mixed.reshape(len(mixed), -1, NUM_SUMS).sum(axis=1)

    def project(params: Params, pairs: Batch) -> Array:
        found = jax.lax.map(lambda part: of_part(params, part), in_parts(pairs))
        return found.reshape(-1, NUM_SUMS)

    return jax.jit(project)


def minus_margin() -> Loss:
    """The objective whose gradient is that of the margin, with a minus."""

    def function(chosen: Scores, rejected: Scores) -> Outcome:
        return Outcome(rejected.log_ratio - chosen.log_ratio)

    row = Objective(function, "d_rejected - d_chosen", "for its gradient alone")
    return make_loss("minus_margin", {"minus_margin": row})


def of_seed(setting: Setting, tools: Tools, seed: int) -> dict[str, Any]:
    """AUC of each score, and accuracy without the pairs that each finds the worst."""
    split = make_split(
        setting,
        seed,
        num_train=NUM_TRAIN,
        num_validation=NUM_VALIDATION,
        flipped=FLIPPED,
    )
    start, order = (
        setting.model.params,
        shuffled(NUM_TRAIN, BATCH_SIZE, NUM_STEPS, seed),
    )

    def tested(params: Params) -> float:
        return accuracy(margins(tools.apply, params, split.test))

    def own(params: Params) -> np.ndarray:
        return -np.asarray(margins(tools.apply, params, split.train))

    harm = -influence(
        tools.project(start, split.train),
        tools.project(start, split.validation),
        margins(tools.apply, start, split.train),
    )
    last = tools.train(start, split.train, order)
    # What else can be done with the labels of the held-out pairs: as many steps.
    others = shuffled(NUM_VALIDATION, BATCH_SIZE, NUM_STEPS, seed)
    clean = tools.train(start, split.validation, others)
    scores = {
        "influence": harm,
        "own loss": own(last),
        "own loss under a model of the held-out pairs": own(clean),
        "random": np.random.default_rng(seed).random(NUM_TRAIN),
    }
    of_scores = {}
    for name, score in scores.items():
        left = tools.train(start, without(split.train, worst(score)), order)
        of_scores[name] = {
            "auc": auc(score, split.flipped),
            "hits": float(split.flipped[worst(score)].mean()),
            "accuracy": tested(left),
        }
    found = {"all": tested(last), "clean": tested(clean), "scores": of_scores}
    print(json.dumps({"seed": seed} | found), flush=True)
    return found


def influence(train: Array, held_out: Array, margin: Array) -> np.ndarray:
    """Of each training pair on the mean margin of the held-out ones ``[pairs]``.

    With ``(Phi^T Phi + d)^-1 Phi^T = Phi^T (Phi Phi^T + d)^-1`` the matrix has a row
    for each pair, not for each sum.

    Args:
      train: projected gradients of the training pairs' margins ``[pairs, sums]``.
      held_out: those of the held-out pairs, likewise.
      margin: of the training pairs ``[pairs]``, nats.
    """
    products = train @ train.T
    damping = DAMPING * jnp.trace(products) / len(train) * jnp.eye(len(train))
    solved = jnp.linalg.solve(products + damping, train @ jnp.mean(held_out, axis=0))
    return np.asarray(jax.nn.sigmoid(-BETA * margin) * solved)


def worst(score: np.ndarray) -> np.ndarray:
    """The places of the highest scores."""
    return np.argsort(-score)[: round(REMOVED * len(score))]


def without(pairs: Batch, places: np.ndarray) -> Batch:
    """The same, some pairs of which count nothing."""
    weight = np.array(pairs.weight)
    weight[places] = 0.0
    return pairs._replace(weight=weight)


def auc(score: np.ndarray, is_flipped: np.ndarray) -> float:
    """The chance that a flipped pair has a higher score than another."""
    above = mannwhitneyu(score[is_flipped], score[~is_flipped]).statistic
    return float(above / is_flipped.sum() / (~is_flipped).sum())


def tables(results: list[dict[str, Any]]) -> str:
    """What each score finds, and what leaving its worst pairs out changes."""
    rows = []
    for name in results[0]["scores"]:
        own = [result["scores"][name] for result in results]
        changes = [
            score["accuracy"] - result["all"]
            for score, result in zip(own, results, strict=True)
        ]
        rows.append(
            [
                name,
                mean_and_error([score["auc"] for score in own]),
                mean_and_error([score["hits"] for score in own], 2),
                mean_and_error([score["accuracy"] for score in own]),
                mean_and_error(changes, 4),
            ]
        )
    for name in ("all", "clean"):
        rows.append([name, "", "", mean_and_error([r[name] for r in results]), ""])
    head = ["score", "AUC", "flipped of those left out", "accuracy without", "change"]
    return markdown(head, rows)


if __name__ == "__main__":
    tyro.cli(main)
