"""Differentially private DPO: per-example clipping, noise, and an accountant.

Claim: none on accuracy; the printed epsilon holds for the run as it is made.
Command: pip install -e '.[experiments]', then
python experiments/functional/private.py --output runs/functional
Hardware, time and result: README.md beside this file.

Each step clips the gradient of every pair to a norm, adds them up and adds normal noise
(DP-SGD; Abadi et al. 2016, arXiv:1607.00133, algorithm 1), by optax; Adam follows,
which sees nothing else of the data. The accountant, of Google's `dp-accounting`,
composes privacy loss distributions under Poisson sampling: every step takes each pair
by a coin of its own. So that is what is done here, and not the loop's permutations, of
which its figures would not be true.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from dp_accounting.pld import PLDAccountant
from jax import Array
from optax.contrib import differentially_private_aggregate
from setting import (
    Setting,
    accuracy,
    load_setting,
    make_split,
    margins,
    markdown,
    mean_and_error,
    take,
)

from dpojax.batch import Batch
from dpojax.losses.make import Loss, make_loss
from dpojax.measure import Apply, Params
from dpojax.per_example import per_example_gradients

NUM_TRAIN, MEAN_BATCH, NUM_STEPS = 2_048, 32, 32
CLIP, NO_CLIP, LEARNING_RATE, DELTA = 1.0, 1e9, 7e-4, 1e-5
EPSILONS = (8.0, 1.0)

# (clip, noise multiplier, key, start, pairs, order) -> parameters, jitted
PrivateTraining = Callable[..., Params]


def main(output: Path, seeds: int = 2) -> None:
    """Prints held-out accuracy by epsilon.

    Args:
      output: directory of the embedded task, made where it is not there.
      seeds: divisions of the pairs, coins and noise.
    """
    setting = load_setting(output)
    training = make_private_training(setting.model.model.apply, make_loss("dpo"))
    ways = {"no clipping, no noise": (NO_CLIP, 0.0), "clipping alone": (CLIP, 0.0)}
    for target in EPSILONS:
        ways[f"epsilon {target:g}"] = (CLIP, noise_for(target))
    rows = []
    for name, (clip, noise) in ways.items():
        found = [of_seed(setting, training, seed, clip, noise) for seed in range(seeds)]
        certain = f"{epsilon(noise):.2f}" if noise else "none"
        rows.append([name, f"{noise:.2f}", certain, mean_and_error(found)])
        print(rows[-1], flush=True)
    head = ["", "noise multiplier", f"epsilon at delta {DELTA:g}", "held-out accuracy"]
    print(markdown(head, rows))


def of_seed(
    setting: Setting, training: PrivateTraining, seed: int, clip: float, noise: float
) -> float:
    """Held-out accuracy after a run."""
    split = make_split(setting, seed, num_train=NUM_TRAIN, clear=False)
    num_pairs = len(split.flipped)
    order = poisson(num_pairs, MEAN_BATCH / num_pairs, NUM_STEPS, seed)
    key = jax.random.key(seed)
    params = training(clip, noise, key, setting.model.params, split.train, order)
    return accuracy(margins(setting.model.model.apply, params, split.test))


def poisson(num_pairs: int, rate: float, num_steps: int, seed: int) -> np.ndarray:
    """The pairs of each step, each taken by its own coin; -1 where a row is empty.

    There are rows for the largest step, so that none is cut, in multiples of 32, so
    that seeds share a program. Both depend on the coins alone.
    """
    rng = np.random.default_rng(seed)
    taken = rng.random((num_steps, num_pairs)) < rate
    order = np.full((num_steps, -(-taken.sum(axis=1).max() // 32) * 32), -1)
    for step, coins in enumerate(taken):
        places = np.flatnonzero(coins)
        order[step, : len(places)] = places
    return order


def make_private_training(apply: Apply, loss: Loss) -> PrivateTraining:
    """Builds the run: a step for each row of the order."""

    def training(
        clip: Any, noise: Any, key: Array, start: Params, pairs: Batch, order: Any
    ) -> Params:
        optimizer = optax.chain(
            differentially_private_aggregate(clip, noise, key),
            # It divides by all rows, of which some are empty.
            optax.scale(order.shape[1] / MEAN_BATCH),
            optax.adam(optax.linear_schedule(LEARNING_RATE, 0.0, NUM_STEPS), b2=0.99),
        )

        def one(carry: tuple, places: Array) -> tuple[tuple, None]:
            (params, state), rows = carry, taken(pairs, places)
            grads = per_example_gradients(apply, loss, params, None, rows)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (start, optimizer.init(start)), order)[0][0]

    return jax.jit(training)


def taken(pairs: Batch, places: Array) -> Batch:
    """The rows of a step; where no pair was taken, one that counts nothing."""
    rows = take(jax.tree.map(jnp.asarray, pairs), places)
    return rows._replace(weight=jnp.where(places[:, None] >= 0, rows.weight, 0.0))


def event(noise: float) -> dp_accounting.DpEvent:
    """What a run reveals."""
    step = dp_accounting.PoissonSampledDpEvent(
        MEAN_BATCH / NUM_TRAIN, dp_accounting.GaussianDpEvent(noise)
    )
    return dp_accounting.SelfComposedDpEvent(step, NUM_STEPS)


def epsilon(noise: float) -> float:
    """The epsilon of a run for pairs that are added or removed, at `DELTA`."""
    return PLDAccountant().compose(event(noise)).get_epsilon(DELTA)


def noise_for(target: float) -> float:
    """The least noise multiplier of which a run's epsilon is at most the target."""
    return dp_accounting.calibrate_dp_mechanism(
        PLDAccountant,
        event,
        target,
        DELTA,
        dp_accounting.ExplicitBracketInterval(0.3, 20.0),
        tol=1e-3,
    )


if __name__ == "__main__":
    tyro.cli(main)
