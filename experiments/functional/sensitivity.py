"""What would another beta have done? The derivative of a whole run, by `jax.jvp`.

Claim: the derivative of the held-out loss by beta, through every step of training,
equals a finite difference of two more runs.
Command: python experiments/functional/sensitivity.py --output runs/functional
Hardware, time and result: README.md beside this file.

Forward mode carries the derivative of all parameters along from step to step, so that
memory does not grow with the number of steps. The held-out loss depends on beta twice,
by its own formula and by the parameters:

    dL/dbeta = partial L / partial beta + <gradient of L by params, d params / dbeta>

The model's kernels have their own rule for gradients, which `jax.jvp` follows where it
differentiates a gradient but not where it differentiates the loss itself; hence the
product at the end.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from jax import Array
from setting import (
    Setting,
    load_setting,
    make_split,
    make_training,
    markdown,
    mean_and_error,
    shuffled,
)

from dpojax.batch import Batch
from dpojax.gradient import denominators, judge
from dpojax.losses.make import Loss, make_loss
from dpojax.losses.pairs import dpo
from dpojax.losses.scores import Outcome, Scores, given
from dpojax.losses.table import OBJECTIVES
from dpojax.measure import Apply, Params, make_measure
from dpojax.train_step import init_state

BETA, STEP_OF_BETA = 0.1, 0.002
NUM_TRAIN, NUM_VALIDATION, BATCH_SIZE = 896, 128, 16
LENGTHS = (1, 8, 32)  # steps of a run
Optimizer = optax.GradientTransformation


class Sensitivity(NamedTuple):
    """The derivative of a held-out loss by beta, and its two parts."""

    loss: Array
    by_formula: Array
    by_training: Array

    @property
    def whole(self) -> Array:
        """Their sum."""
        return self.by_formula + self.by_training


def main(output: Path, seeds: int = 2) -> None:
    """Prints derivatives after runs of several lengths, beside finite differences.

    Args:
      output: directory of the embedded task, made where it is not there.
      seeds: divisions of the pairs and orders.
    """
    setting = load_setting(output)
    optimizer, rows = differentiable_adam(), []
    for num_steps in LENGTHS:
        found = [of_seed(setting, optimizer, seed, num_steps) for seed in range(seeds)]
        rows.append([str(num_steps), *row(found)])
    head = ["steps", "held-out loss", "by the formula", "by training"]
    more = ["derivative", "finite difference", "apart at most"]
    print(markdown(head + more, rows))


def row(found: list[tuple[Sensitivity, float]]) -> list[str]:
    """Means over seeds, and how far the two derivatives are apart at most.

    As a share of the parts, which may cancel.
    """
    exact, differences = zip(*found, strict=True)
    columns = [*zip(*exact, strict=True), [one.whole for one in exact], differences]
    apart = max(
        abs(one.whole - other) / (abs(one.by_formula) + abs(one.by_training))
        for one, other in found
    )
    return [*map(mean_and_error, columns), f"{apart:.1e}"]


def of_seed(
    setting: Setting, optimizer: Optimizer, seed: int, num_steps: int
) -> tuple[Sensitivity, float]:
    """The derivative, and the central difference of two other runs."""
    split = make_split(
        setting, seed, num_train=NUM_TRAIN, num_validation=NUM_VALIDATION
    )
    order = shuffled(NUM_TRAIN, BATCH_SIZE, num_steps, seed)
    tools = setting.model.model.apply, optimizer, BETA
    data = setting.model.params, split.train, order, split.validation
    begun = time.perf_counter()
    exact = jax.device_get(sensitivity(*tools, *data))
    halfway = time.perf_counter()
    difference = finite_difference(*tools, *data)
    ended = time.perf_counter()
    print(num_steps, seed, exact, difference)
    print(f"{halfway - begun:.1f} s and {ended - halfway:.1f} s", flush=True)
    return exact, difference


def differentiable_adam() -> Optimizer:
    """The embedded task's rates, and a root that is smooth where gradients are 0."""
    return optax.adam(7e-4, b2=0.99, eps=1e-6, eps_root=1e-12)


def loss_at(beta: float | Array) -> Loss:
    """DPO's loss with a beta that need not be a number yet: it scales log-ratios."""

    def scaled(scores: Scores) -> Scores:
        reference = given(scores.reference, "the reference's log-probabilities")
        return scores._replace(policy=beta * scores.policy, reference=beta * reference)

    def at_beta(chosen: Scores, rejected: Scores) -> Outcome:
        return dpo(scaled(chosen), scaled(rejected), beta=1.0)

    return make_loss("dpo", {"dpo": OBJECTIVES["dpo"]._replace(function=at_beta)})


def trained(
    apply: Apply,
    optimizer: Optimizer,
    start: Params,
    pairs: Batch,
    order: Any,
    beta: float | Array,
) -> Params:
    """The parameters after training."""
    training = make_training(apply, loss_at(beta), optimizer)
    return training(init_state(start, optimizer), pairs, order).params


@partial(jax.jit, static_argnums=(0, 1))
def sensitivity(
    apply: Apply,
    optimizer: Optimizer,
    beta: Any,
    start: Params,
    pairs: Batch,
    order: Any,
    held_out: Batch,
) -> Sensitivity:
    """The held-out loss after a run, and its derivative by beta."""
    run = partial(trained, apply, optimizer, start, pairs, order)
    params, tangent = jax.jvp(run, (beta,), (jnp.ones_like(beta),))
    take = jax.value_and_grad(partial(held_out_loss, apply, held_out), (0, 1))
    loss, (by_params, by_formula) = take(params, beta)
    return Sensitivity(loss, by_formula, vdot(by_params, tangent))


def finite_difference(
    apply: Apply, optimizer: Optimizer, beta: float, *data: Any
) -> float:
    """The same derivative, roughly, from two more runs; `data` as in `sensitivity`."""
    above, below = (
        loss_after(apply, optimizer, near, *data)
        for near in (beta + STEP_OF_BETA, beta - STEP_OF_BETA)
    )
    return float(above - below) / (2 * STEP_OF_BETA)


@partial(jax.jit, static_argnums=(0, 1))
def loss_after(
    apply: Apply,
    optimizer: Optimizer,
    beta: Any,
    start: Params,
    pairs: Batch,
    order: Any,
    held_out: Batch,
) -> Array:
    """The held-out loss after a run."""
    params = trained(apply, optimizer, start, pairs, order, beta)
    return held_out_loss(apply, held_out, params, beta)


def vdot(one: Params, other: Params) -> Array:
    """The product of two trees."""
    return jnp.asarray(optax.tree.vdot(one, other))


def held_out_loss(
    apply: Apply, pairs: Batch, params: Params, beta: float | Array
) -> Array:
    """DPO's mean loss."""
    loss, rows = loss_at(beta), jax.tree.map(jnp.asarray, pairs)
    measured = make_measure(apply, loss.needs)(params, None, rows)
    return judge(loss, measured, rows, {}, denominators(rows))[0]


if __name__ == "__main__":
    tyro.cli(main)
