"""Which pairs harm? Influence of single pairs on a held-out loss, from their gradients.

Claim: of training pairs of which 20 % have flipped labels, those whose gradients oppose
the gradient of 256 clean held-out pairs are the flipped ones (AUC above 0.8), and
without the worst 5 % of them held-out accuracy is higher.
Command: python experiments/functional/influence.py --output runs/functional
Hardware, time and result: README.md beside this file.

A pair's influence is what its steps did to the held-out loss, to first order, summed
over checkpoints of one run (TracIn; Pruthi et al. 2020, arXiv:2002.08484, section 3),
in Adam's metric as in LESS (Xia et al. 2024, arXiv:2402.04333, section 3):

    I(z) = sum_t rate_t <gradient of the held-out loss, P_t gradient of the loss of z>

P_t divides by the root of Adam's mean square. It falls below 0 where a pair harms.
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
from scipy.stats import mannwhitneyu
from setting import (
    AT_ONCE,
    Setting,
    Split,
    Training,
    accuracy,
    load_setting,
    make_split,
    make_training,
    margins,
    markdown,
    mean_and_error,
    shuffled,
)

from dpojax.batch import Batch
from dpojax.losses.make import Loss, make_loss
from dpojax.measure import Apply, Params
from dpojax.optimizer import make_optimizer, make_schedule
from dpojax.per_example import per_example_gradients
from dpojax.train_step import TrainState, init_state

NUM_TRAIN, NUM_VALIDATION, FLIPPED = 1_024, 256, 0.2
BATCH_SIZE, NUM_STEPS, NUM_CHECKPOINTS = 16, 128, 2
LEARNING_RATE = 7e-4
REMOVED = 0.05


class Checkpoint(NamedTuple):
    """Where a run was, and what its next steps divide gradients by."""

    params: Params
    scale: Params  # the root of Adam's mean square
    rate: float  # learning rate there, times steps until the next one


class Tools(NamedTuple):
    """Compiled once for all seeds."""

    apply: Apply
    optimizer: optax.GradientTransformation
    training: Training
    mean_gradient: Callable[..., Params]
    products: Callable[..., Array]

    def train(self, start: Params, pairs: Batch, order: np.ndarray) -> Params:
        """The parameters after a whole run."""
        state = init_state(start, self.optimizer)
        return self.training(state, pairs, order).params


def main(output: Path, seeds: int = 6) -> None:
    """Prints how well flipped pairs are found, and what their removal changes.

    Args:
      output: directory of the embedded task, made where it is not there.
      seeds: divisions of the pairs, flips and orders.
    """
    setting = load_setting(output)
    tools = make_tools(setting.model.model.apply, make_run_optimizer())
    results = [of_seed(setting, tools, seed) for seed in range(seeds)]
    print(tables(results))


def make_tools(apply: Apply, optimizer: optax.GradientTransformation) -> Tools:
    """Training by dpo, and products of its gradients."""
    loss = make_loss("dpo")
    return Tools(
        apply,
        optimizer,
        make_training(apply, loss, optimizer),
        make_mean_gradient(apply, loss),
        make_products(apply, loss),
    )


def of_seed(setting: Setting, tools: Tools, seed: int) -> dict[str, Any]:
    """AUC of each score, and accuracy without the pairs that each finds the worst."""
    split = make_split(
        setting,
        seed,
        num_train=NUM_TRAIN,
        num_validation=NUM_VALIDATION,
        flipped=FLIPPED,
    )
    start, num_pairs = setting.model.params, len(split.flipped)
    order = shuffled(num_pairs, BATCH_SIZE, NUM_STEPS, seed)

    def tested(params: Params) -> float:
        return accuracy(margins(tools.apply, params, split.test))

    def own(params: Params) -> np.ndarray:
        return -np.asarray(margins(tools.apply, params, split.train))

    checkpoints, last = train_with_checkpoints(tools, start, split.train, order)
    # What else can be done with the labels of the held-out pairs: as many steps.
    known = len(split.validation.tokens)
    clean = tools.train(
        start, split.validation, shuffled(known, BATCH_SIZE, NUM_STEPS, seed)
    )
    rng = np.random.default_rng(seed)
    scores = harm(tools, checkpoints, split) | {
        "own loss": own(last),
        "own loss under a model of the held-out pairs": own(clean),
        "random": rng.random(num_pairs),
    }
    found = {"all": tested(last), "held-out pairs alone": tested(clean)}
    of_scores = {
        name: {
            "auc": auc(score, split.flipped),
            "hits": float(split.flipped[worst(score)].mean()),
        }
        for name, score in scores.items()
    }
    print(json.dumps({"seed": seed} | found | of_scores), flush=True)
    for name, score in scores.items():
        left = without(split.train, worst(score))
        of_scores[name]["accuracy"] = tested(tools.train(start, left, order))
    print(json.dumps({"seed": seed} | of_scores), flush=True)
    return found | {"scores": of_scores}


def make_run_optimizer() -> optax.GradientTransformation:
    """The embedded task's."""
    schedule = make_schedule(
        "linear", learning_rate=LEARNING_RATE, num_steps=NUM_STEPS, warmup_steps=0
    )
    return make_optimizer("adamw", schedule, beta2=0.99)


def train_with_checkpoints(
    tools: Tools, start: Params, pairs: Batch, order: np.ndarray
) -> tuple[list[Checkpoint], Params]:
    """A run that is looked at in the middle of each of its parts."""
    state = init_state(start, tools.optimizer)
    checkpoints, half = [], NUM_STEPS // NUM_CHECKPOINTS // 2
    for first in range(0, NUM_STEPS, 2 * half):
        state = tools.training(state, pairs, order[first : first + half])
        rate = LEARNING_RATE * (1 - int(state.step) / NUM_STEPS) * 2 * half
        checkpoints.append(Checkpoint(state.params, adam_scale(state), rate))
        state = tools.training(state, pairs, order[first + half : first + 2 * half])
    return checkpoints, state.params


def adam_scale(state: TrainState) -> Params:
    """What Adam divides by at this step."""
    nu = optax.tree.get(state.opt_state, "nu")
    debias = 1 - 0.99 ** state.step.astype(jnp.float32)
    return jax.tree.map(lambda square: jnp.sqrt(square / debias) + 1e-8, nu)


def harm(
    tools: Tools, checkpoints: list[Checkpoint], split: Split
) -> dict[str, np.ndarray]:
    """How much the steps of each training pair raised the held-out loss, twice."""
    found = np.zeros((2, len(split.flipped)))
    for params, scale, rate in checkpoints:
        by_held_out = tools.mean_gradient(params, split.validation)
        adam = jax.tree.map(jnp.divide, by_held_out, scale)
        directions = jax.tree.map(lambda *both: jnp.stack(both), adam, by_held_out)
        found -= rate * np.asarray(tools.products(params, split.train, directions)).T
    return {"influence": found[0], "influence, without Adam's metric": found[1]}


def make_products(apply: Apply, loss: Loss) -> Callable[..., Array]:
    """Builds ``(params, pairs, directions) -> [pairs, directions]``.

    Products of each pair's own gradient with each of some directions.
    """

    def products(params: Params, pairs: Batch, directions: Params) -> Array:
        def of_part(part: Batch) -> Array:
            grads = per_example_gradients(apply, loss, params, None, part)
            return sum(
                jnp.tensordot(
                    grad.reshape(len(grad), -1), way.reshape(len(way), -1), (1, 1)
                )
                for grad, way in zip(
                    jax.tree.leaves(grads), jax.tree.leaves(directions), strict=True
                )
            )

        found = jax.lax.map(of_part, in_parts(pairs))
        return found.reshape(-1, found.shape[-1])

    return jax.jit(products)


def make_mean_gradient(apply: Apply, loss: Loss) -> Callable[..., Params]:
    """Builds ``(params, pairs) -> gradient of their mean loss``."""

    def mean_gradient(params: Params, pairs: Batch) -> Params:
        def of_part(total: Params, part: Batch) -> tuple[Params, None]:
            grads = per_example_gradients(apply, loss, params, None, part)
            return jax.tree.map(lambda t, g: t + jnp.sum(g, axis=0), total, grads), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total = jax.lax.scan(of_part, zeros, in_parts(pairs))[0]
        return optax.tree.scale(1 / len(pairs.tokens), total)

    return jax.jit(mean_gradient)


def in_parts(pairs: Batch) -> Batch:
    """``[pairs, ...]`` to ``[parts, AT_ONCE, ...]``; the number must divide."""
    return jax.tree.map(
        lambda array: jnp.asarray(array).reshape(-1, AT_ONCE, *array.shape[1:]), pairs
    )


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
    for name in ("all", "held-out pairs alone"):
        rows.append([name, "", "", mean_and_error([r[name] for r in results]), ""])
    head = ["score", "AUC", "flipped of those left out", "accuracy without", "change"]
    return markdown(head, rows)


if __name__ == "__main__":
    tyro.cli(main)
