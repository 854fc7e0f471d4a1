"""How noisy is a gradient? The noise scale of a batch, from gradients of examples.

Claim: the simple noise scale of DPO's gradient, the batch size at which noise and
signal of a step are as large, is some hundreds of pairs where a run starts, and 20 %
of flipped labels multiply it by about ``1 / (1 - 2 * 0.2)^2``.
Command: python experiments/functional/noise_scale.py --output runs/functional
Hardware, time and result: README.md beside this file.

    B = tr(Sigma) / |G|^2

G is the mean gradient and Sigma the covariance of single pairs' gradients. Both are
estimated without bias from the same pairs: the squared norm of their mean is too large
by ``tr(Sigma) / n``.

References:
  McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv:1812.06162,
  eq. 2.9 and appendix A.1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from setting import (
    Setting,
    Training,
    in_parts,
    load_setting,
    make_run_optimizer,
    make_split,
    make_training,
    markdown,
    mean_and_error,
    shuffled,
    take,
)

from dpojax.batch import Batch
from dpojax.losses.make import Loss, make_loss
from dpojax.measure import Apply, Params
from dpojax.per_example import per_example_gradients
from dpojax.train_step import init_state

NUM_TRAIN, NUM_MEASURED, BATCH_SIZE = 896, 512, 16
LOOKS = (0, 14, 56, 112)  # after so many steps


class Noise(NamedTuple):
    """Both parts of the noise scale."""

    variance: Array  # tr(Sigma), of single pairs' gradients
    signal: Array  # |G|^2 without bias; may be below 0 where there is little

    @property
    def scale(self) -> Array:
        """The batch size at which both are as large."""
        return self.variance / self.signal


def main(output: Path, seeds: int = 3) -> None:
    """Prints the noise scale along runs, without and with flipped labels.

    Args:
      output: directory of the embedded task, made where it is not there.
      seeds: divisions of the pairs and orders.
    """
    setting = load_setting(output)
    apply, loss = setting.model.model.apply, make_loss("dpo")
    optimizer = make_run_optimizer(LOOKS[-1])
    tools = optimizer, make_training(apply, loss, optimizer), make_noise(apply, loss)
    rows = []
    for flipped in (0.0, 0.2):
        found = [along_run(setting, *tools, seed, flipped) for seed in range(seeds)]
        for place, step in enumerate(LOOKS):
            noises = [look[place] for look in found]
            rows.append(
                [
                    f"{flipped:.0%}",
                    str(step),
                    mean_and_error([np.sqrt(noise.signal) for noise in noises]),
                    mean_and_error([np.sqrt(noise.variance) for noise in noises]),
                    mean_and_error([noise.scale for noise in noises], 1),
                ]
            )
    head = ["flipped", "step", "norm of the mean", "norm of the noise", "noise scale"]
    print(markdown(head, rows))


def along_run(
    setting: Setting,
    optimizer: optax.GradientTransformation,
    training: Training,
    noise: Callable[[Params, Batch], Noise],
    seed: int,
    flipped: float,
) -> list[Noise]:
    """The noise at each of `LOOKS`, of some of the pairs that the run learns from."""
    split = make_split(setting, seed, num_train=NUM_TRAIN, flipped=flipped)
    measured = take(split.train, slice(NUM_MEASURED))
    order = shuffled(NUM_TRAIN, BATCH_SIZE, LOOKS[-1], seed)
    state, noises = init_state(setting.model.params, optimizer), []
    for first, last in zip((0, *LOOKS), LOOKS, strict=False):
        state = training(state, split.train, order[first:last])
        noises.append(noise(state.params, measured))
    return jax.device_get(noises)


def make_noise(apply: Apply, loss: Loss) -> Callable[[Params, Batch], Noise]:
    """Builds ``(params, pairs) -> noise``, part by part."""

    def noise(params: Params, pairs: Batch) -> Noise:
        def of_part(sums: tuple, part: Batch) -> tuple[tuple, None]:
            total, squares = sums
            grads = per_example_gradients(apply, loss, params, None, part)
            total = jax.tree.map(lambda t, g: t + jnp.sum(g, axis=0), total, grads)
            return (total, squares + optax.tree.norm(grads, squared=True)), None

        start = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
        total, squares = jax.lax.scan(of_part, start, in_parts(pairs))[0]
        return noise_of_sums(total, squares, len(pairs.tokens))

    return jax.jit(noise)


def noise_of_sums(total: Params, squares: Array, count: int) -> Noise:
    """The noise from the sum of gradients and the sum of their squared norms."""
    of_mean = optax.tree.norm(total, squared=True) / count**2
    variance = (squares - count * of_mean) / (count - 1)
    return Noise(variance, of_mean - variance / count)


if __name__ == "__main__":
    tyro.cli(main)
