"""The Optax chain: clipping, AdamW or RMSprop, and the schedule. Knows no model."""

import re
from typing import Any, Literal, get_args

import jax
import optax

Name = Literal["adamw", "rmsprop"]
Schedule = Literal["constant", "linear", "cosine"]


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
    if learning_rate < 0 or warmup_steps < 0:
        raise ValueError(
            f"The learning rate {learning_rate} and the warm-up of {warmup_steps} "
            "steps must not be negative."
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
) -> optax.GradientTransformation:
    """Clips by the global norm, then AdamW or RMSprop.

    Args:
      name: ``"adamw"``, or ``"rmsprop"`` as in the DPO paper's code, which is torch's:
        decay 0.99, epsilon added outside the square root.
      schedule: learning rate by step.
      max_grad_norm: the norm clipped to; 0 does not clip.
      weight_decay: decoupled; on matrices only, not on norms and biases.
      beta1: AdamW's decay of the mean.
      beta2: AdamW's decay of the mean square.
      epsilon: added to the root of the mean square.

    Raises:
      ValueError: if there is no such optimiser, a setting is out of its range, or
        RMSprop is given one that it does not have.
    """
    if name not in get_args(Name):
        raise ValueError(
            f"There is no optimiser {name!r}; there are {', '.join(get_args(Name))}."
        )
    if min(max_grad_norm, weight_decay, epsilon) < 0:
        raise ValueError(
            f"max_grad_norm {max_grad_norm}, weight_decay {weight_decay} and epsilon "
            f"{epsilon} must not be negative."
        )
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1 {beta1} and beta2 {beta2} must be in [0, 1).")
    if name == "rmsprop":
        if weight_decay or (beta1, beta2) != (0.9, 0.999):
            raise ValueError(
                "RMSprop has no weight decay and no beta1 or beta2 here; leave them "
                "out or use adamw."
            )
        rule = optax.rmsprop(schedule, decay=0.99, eps=epsilon, eps_in_sqrt=False)
    else:
        rule = optax.adamw(
            schedule, beta1, beta2, epsilon, weight_decay=weight_decay, mask=_decay_mask
        )
    if max_grad_norm == 0:
        return rule
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), rule)


def _decay_mask(params: Any) -> Any:
    def decays(path: tuple, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return re.search(r"(scale|bias)$", name) is None

    return jax.tree.map_with_path(decays, params)
