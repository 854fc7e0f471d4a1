"""The reference: an argument of the step; one that moves is state of the step.

A frozen reference is not differentiated, not donated and not checkpointed. A moving one
follows the policy every so many steps, so it is all of these but differentiated, and
its log-probabilities cannot be computed once and kept. This file knows nothing of
losses or steps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Params = Any


def copy_params(params: Params) -> Params:
    """A copy with the same shardings.

    The step donates the policy's buffers; a reference that shared them would be deleted
    with the first update.
    """
    return jax.tree.map(jnp.copy, params)


class Movement(NamedTuple):
    """How a reference follows the policy, as two functions that travel together.

    The state is a dict whose entry ``reference`` is the parameters to refer to.
    """

    init: Callable[[Params, Params], dict[str, Params]]  # (policy, reference) -> state
    # (state, policy after the step, number of that step) -> state
    update: Callable[[dict[str, Params], Params, Int[Array, ""]], dict[str, Params]]


def tr_dpo(*, alpha: float = 0.6, every: int = 512) -> Movement:
    """Trust Region DPO: every so many steps the reference moves towards the policy.

    ``reference = alpha policy + (1 - alpha) reference``: a soft update; with alpha 1
    the hard one.

    Args:
      alpha: weight of the policy, in (0, 1]; 0.6 in the paper's soft updates and TRL.
      every: optimiser steps between updates; TRL 512.

    References:
      Gorbatovski et al., Learn Your Reference Model, 2024, arXiv:2404.09656, eq. 6, 7.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha of the moving reference is {alpha}, not in (0, 1].")

    def move(state: dict[str, Params], policy: Params) -> dict[str, Params]:
        mixed = jax.tree.map(partial(_mix, alpha), state["reference"], policy)
        return {"reference": mixed}

    def update(
        state: dict[str, Params], policy: Params, step: Int[Array, ""]
    ) -> dict[str, Params]:
        return _every(every, step, move, state, policy)

    return Movement(lambda _, reference: {"reference": reference}, update)


def bema(
    *,
    ema_power: float = 0.5,
    bias_power: float = 0.2,
    lag: float = 10.0,
    every: int = 400,
) -> Movement:
    """A bias-corrected exponential moving average of the policy as its reference.

    At step t, a multiple of `every`: ``average += (lag + t)^-ema_power (policy -
    average)`` and ``reference = average + (lag + t)^-bias_power (policy - policy_0)``.

    Args:
      ema_power: the paper's kappa, decay of the average's step size.
      bias_power: its eta, decay of the correction.
      lag: its rho, a virtual age at the start.
      every: its phi, optimiser steps between updates. Defaults are TRL's.

    References:
      Block and Zhang, EMA Without the Lag (BEMA), 2025, arXiv:2508.00180, algorithm 1.
    """
    if min(ema_power, bias_power) < 0 or lag <= 0:
        raise ValueError(
            f"ema_power {ema_power} and bias_power {bias_power} must not be negative, "
            f"and lag {lag} must be positive."
        )

    def init(policy: Params, reference: Params) -> dict[str, Params]:
        start, average = copy_params(policy), copy_params(policy)
        return {"reference": reference, "average": average, "start": start}

    def update(
        state: dict[str, Params], policy: Params, step: Int[Array, ""]
    ) -> dict[str, Params]:
        age = lag + step.astype(jnp.float32)

        def move(state: dict[str, Params], policy: Params) -> dict[str, Params]:
            mix = partial(_mix, age**-ema_power)
            average = jax.tree.map(mix, state["average"], policy)
            reference = jax.tree.map(
                lambda mean, now, start: mean + age**-bias_power * (now - start),
                average,
                policy,
                state["start"],
            )
            return state | {"reference": reference, "average": average}

        return _every(every, step, move, state, policy)

    return Movement(init, update)


def _mix(weight: float | Array, old: Array, new: Array) -> Array:
    return (1 - weight) * old + weight * new


def _every(
    every: int,
    step: Int[Array, ""],
    move: Callable[[dict[str, Params], Params], dict[str, Params]],
    state: dict[str, Params],
    policy: Params,
) -> dict[str, Params]:
    if every < 1:
        raise ValueError(f"The reference moves every {every} steps; give at least 1.")
    return jax.lax.cond(step % every == 0, move, lambda kept, _: kept, state, policy)
