"""A loss that is learned: its coefficients by gradient through whole runs.

Claim: none beforehand; README.md beside this file says whether what is found beats dpo.
Command: python experiments/functional/discovered.py --output runs/functional
Hardware, time and result: README.md beside this file.

    loss = sum_i c_i phi_i(h),  h = beta (d_chosen - d_rejected)

over functions of the margin that known objectives are made of. It starts as dpo. An
inner run trains the policy by it on pairs of which 20 % have flipped labels; the outer
loss says how badly the result ranks clean pairs, and its gradient by the coefficients
is carried forward through all steps: a few coefficients, half a million parameters. The
idea of searching for losses of this form is DiscoPOP's (Lu et al. 2024,
arXiv:2406.08414), which lets a language model write them.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from jax.nn import log_sigmoid, relu, sigmoid, softplus
from sensitivity import Optimizer, differentiable_adam, vdot
from setting import (
    Setting,
    Split,
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
from dpojax.losses.objective import Objective
from dpojax.losses.scores import Outcome, Scores
from dpojax.measure import Apply, Params, make_measure
from dpojax.train_step import init_state

BETA, FLIPPED, BATCH_SIZE = 0.1, 0.2, 16
TERMS: dict[str, Callable[[Array], Array]] = {
    "dpo, log(1 + e^-h)": lambda h: -log_sigmoid(h),
    "its reverse, log(1 + e^h)": lambda h: -log_sigmoid(-h),
    "sigmoid(-h)": lambda h: sigmoid(-h),
    "hinge, max(0, 1 - h)": lambda h: relu(1 - h),
    "square, (h - 1)^2 / 2": lambda h: jnp.square(h - 1) / 2,
}
DPO = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
# Of the outer problem: openings that no comparison uses.
NUM_OPENINGS, INNER_TRAIN, INNER_VALIDATION, INNER_STEPS = 600, 512, 256, 32
OUTER_STEPS, OUTER_RATE = 12, 0.05
# Of the comparison.
NUM_TRAIN, NUM_STEPS = 512, 64
OTHERS = {
    "dpo": make_loss("dpo"),
    "robust_dpo, label_smoothing 0.2": make_loss("robust_dpo", label_smoothing=0.2),
}


def main(output: Path, seeds: int = 4) -> None:
    """Learns the coefficients, then compares the loss on other openings.

    Args:
      output: directory of the embedded task, made where it is not there.
      seeds: divisions of the pairs, flips and orders of the comparison.
    """
    setting = load_setting(output)
    openings = np.random.default_rng(0).permutation(np.unique(setting.opening))
    coefficients = discover(setting, openings[:NUM_OPENINGS])
    print(json.dumps(dict(zip(TERMS, coefficients.tolist(), strict=True))))
    losses = OTHERS | {"discovered": make_discovered(coefficients)}
    found = {
        name: [
            held_out_accuracy(setting, loss, seed, openings[NUM_OPENINGS:])
            for seed in range(seeds)
        ]
        for name, loss in losses.items()
    }
    rows = [
        [
            name,
            mean_and_error(values),
            mean_and_error(np.subtract(values, found["dpo"])),
        ]
        for name, values in found.items()
    ]
    print(markdown(["loss", "held-out accuracy", "more than dpo"], rows))


def make_discovered(coefficients: Any) -> Loss:
    """The loss with these coefficients, numbers or what is being differentiated."""

    def discovered(chosen: Scores, rejected: Scores) -> Outcome:
        rewards = BETA * chosen.log_ratio, BETA * rejected.log_ratio
        h = rewards[0] - rewards[1]
        parts = [
            coefficient * term(h)
            for coefficient, term in zip(coefficients, TERMS.values(), strict=True)
        ]
        return Outcome(sum(parts, jnp.zeros(())), rewards)

    row = Objective(discovered, "sum_i c_i phi_i(h)", "learned here")
    return make_loss("discovered", {"discovered": row})


def discover(setting: Setting, openings: np.ndarray) -> np.ndarray:
    """Coefficients that Adam finds from dpo's, a new inner problem each step."""
    coefficients = jnp.asarray(DPO)
    inner, outer = differentiable_adam(), optax.adam(OUTER_RATE)
    state = outer.init(coefficients)
    for number in range(OUTER_STEPS):
        split = make_split(
            setting,
            number,
            num_train=INNER_TRAIN,
            num_validation=INNER_VALIDATION,
            flipped=FLIPPED,
            openings=openings,
        )
        order = shuffled(len(split.flipped), BATCH_SIZE, INNER_STEPS, number)
        value, slope = outer_gradient(
            setting.model.model.apply,
            inner,
            coefficients,
            setting.model.params,
            split.train,
            split.validation,
            order,
        )
        updates, state = outer.update(slope, state)
        coefficients = jnp.asarray(optax.apply_updates(coefficients, updates))
        print(number, float(value), np.round(coefficients, 3).tolist(), flush=True)
    return np.asarray(coefficients)


@partial(jax.jit, static_argnums=(0, 1))
def outer_gradient(
    apply: Apply,
    optimizer: Optimizer,
    coefficients: Array,
    start: Params,
    train: Batch,
    validation: Batch,
    order: Array,
) -> tuple[Array, Array]:
    """How badly clean pairs are ranked after a run, and its gradient."""

    def trained(coefficients: Array) -> Params:
        training = make_training(apply, make_discovered(coefficients), optimizer)
        return training(init_state(start, optimizer), train, order).params

    def along(direction: Array) -> tuple[Params, Params]:
        return jax.jvp(trained, (coefficients,), (direction,))

    params, tangents = jax.vmap(along, out_axes=(None, 0))(jnp.eye(len(coefficients)))
    value, by_params = jax.value_and_grad(partial(misranked, apply))(params, validation)
    slope = jax.vmap(partial(vdot, by_params))(tangents)
    return value, slope


def misranked(apply: Apply, params: Params, pairs: Batch) -> Array:
    """A smooth share of pairs that are ranked wrongly; larger margins do not help it.

    The margin is taken in units of its root mean square over the pairs.
    """
    rows = jax.tree.map(jnp.asarray, pairs)
    scores = make_measure(apply, frozenset({"reference"}))(params, None, rows).scores
    margin = scores.log_ratio[:, 0, 0] - scores.log_ratio[:, 0, 1]
    size = jnp.sqrt(jnp.mean(jnp.square(margin)) + 1e-12)
    return jnp.mean(softplus(-4 * margin / size)) / softplus(0.0)


def held_out_accuracy(
    setting: Setting, loss: Loss, seed: int, openings: np.ndarray
) -> float:
    """Of clean pairs, after a run on pairs of which some are flipped."""
    split: Split = make_split(
        setting,
        seed,
        num_train=NUM_TRAIN,
        flipped=FLIPPED,
        openings=openings,
    )
    apply, optimizer = setting.model.model.apply, differentiable_adam()
    order = shuffled(len(split.flipped), BATCH_SIZE, NUM_STEPS, seed)
    training = make_training(apply, loss, optimizer)
    state = training(init_state(setting.model.params, optimizer), split.train, order)
    return accuracy(margins(apply, state.params, split.test))


if __name__ == "__main__":
    tyro.cli(main)
