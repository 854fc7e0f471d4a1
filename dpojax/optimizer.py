"""The Optax chain: clipping, the optimiser's rule, and the schedule. Knows no model."""

import math
import re
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from dpojax.int8_adam import scale_by_int8_adam

Name = Literal["adamw", "rmsprop", "adafactor"]
Moments = Literal["float32", "bfloat16", "int8"]
Schedule = Literal["constant", "linear", "cosine"]

_DEFAULTS = {
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "moments": "float32",
}
_MOST_STEPS = 10**8
_SETTINGS = {  # of each optimiser
    "adamw": frozenset(_DEFAULTS),
    "rmsprop": frozenset({"epsilon"}),
    "adafactor": frozenset(),
}


def make_schedule(
    schedule: Schedule, *, learning_rate: float, num_steps: int, warmup_steps: int
) -> optax.Schedule:
    """Learning rate at each step.

    Linear from 0 at step 0 to `learning_rate` at step `warmup_steps`, then constant, or
    to 0 at `num_steps` on a line or half a cosine: Hugging Face's schedules, step for
    step.

    Raises:
      ValueError: if there is no such schedule, or the warm-up is longer than the run.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(
            f"There is no schedule {schedule!r}; "
            f"there are {', '.join(get_args(Schedule))}."
        )
    if not 0 <= learning_rate < math.inf or warmup_steps < 0:
        raise ValueError(
            f"The learning rate {learning_rate} and the warm-up of {warmup_steps} "
            "steps must be finite and not negative."
        )
    if num_steps > _MOST_STEPS:
        raise ValueError(
            f"The run has {num_steps:,} steps; give at most {_MOST_STEPS:,} by --steps "
            "or --epochs."
        )
    if warmup_steps > num_steps:
        raise ValueError(
            f"The warm-up of {warmup_steps} steps is longer than the run of "
            f"{num_steps}; shorten it or train longer."
        )
    decay_steps = max(1, num_steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(learning_rate, decay_steps),
    }[schedule]
    before = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([before, after], [warmup_steps])


def make_optimizer(
    name: Name,
    schedule: optax.Schedule,
    *,
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """Clips by the global norm, then AdamW, RMSprop or Adafactor.

    Args:
      name: ``"adamw"``; ``"rmsprop"`` as in the DPO paper's code, which is torch's:
        decay 0.99, epsilon added outside the square root; or ``"adafactor"``, which
        keeps of a matrix's mean squares those of its rows and columns, and no mean.
        Learning rates are its absolute steps, as transformers and TRL set it: not
        shares of the weights, for which the objectives' rates are far too small.
      schedule: learning rate by step.
      max_grad_norm: the norm clipped to; 0 does not clip.
      weight_decay: decoupled; on matrices only, not on norms and biases.
      beta1: AdamW's decay of the mean.
      beta2: AdamW's decay of the mean square.
      epsilon: added to the root of the mean square.
      moments: how AdamW keeps them. ``"bfloat16"`` holds for the mean alone: the mean
        square changes by a thousandth a step, less than half of what bfloat16 tells
        apart, and would not move. ``"int8"``: both, see `dpojax.int8_adam`.

    Raises:
      ValueError: if there is no such optimiser, a setting is out of its range, or
        the optimiser does not have it.
    """
    given = {"weight_decay": weight_decay, "beta1": beta1, "beta2": beta2,
             "epsilon": epsilon, "moments": moments}  # fmt: skip
    _check(name, max_grad_norm, given)
    rule = _RULES[name](schedule, **{key: given[key] for key in _SETTINGS[name]})
    if max_grad_norm == 0:
        return rule
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), rule)


def _check(name: Name, max_grad_norm: float, given: dict[str, Any]) -> None:
    if name not in _SETTINGS:
        raise ValueError(
            f"There is no optimiser {name!r}; there are {', '.join(_SETTINGS)}."
        )
    if given["moments"] not in get_args(Moments):
        raise ValueError(
            f"Moments cannot be kept as {given['moments']!r}; "
            f"there are {', '.join(get_args(Moments))}."
        )
    for setting, value in given.items():
        if value != _DEFAULTS[setting] and setting not in _SETTINGS[name]:
            raise ValueError(
                f"{name} has no {setting} here; leave it out or use adamw."
            )
    numbers = (max_grad_norm, given["weight_decay"], given["epsilon"])
    if not all(0 <= number < math.inf for number in numbers):
        raise ValueError(
            f"max_grad_norm {max_grad_norm}, weight_decay {given['weight_decay']} and "
            f"epsilon {given['epsilon']} must be finite and must not be negative."
        )
    beta1, beta2 = given["beta1"], given["beta2"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1 {beta1} and beta2 {beta2} must be in [0, 1).")


def _adamw(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    moments: Moments,
) -> optax.GradientTransformation:
    if moments == "int8":
        scale = scale_by_int8_adam(beta1, beta2, epsilon)
    else:
        scale = optax.scale_by_adam(beta1, beta2, epsilon, mu_dtype=jnp.dtype(moments))
    decay = optax.add_decayed_weights(weight_decay, mask=_decay_mask)
    return optax.chain(scale, decay, optax.scale_by_learning_rate(schedule))


def _rmsprop(
    schedule: optax.Schedule, *, epsilon: float
) -> optax.GradientTransformation:
    return optax.rmsprop(schedule, decay=0.99, eps=epsilon, eps_in_sqrt=False)


def _adafactor(schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adafactor(schedule, multiply_by_parameter_scale=False)


def _decay_mask(params: Any) -> Any:
    def decays(path: tuple, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return re.search(r"(scale|bias)$", name) is None

    return jax.tree.map_with_path(decays, params)


_RULES = {"adamw": _adamw, "rmsprop": _rmsprop, "adafactor": _adafactor}
