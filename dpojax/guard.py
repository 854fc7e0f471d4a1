"""What becomes of an update whose numbers are not finite: nothing.

One such update would leave no weight that is a number, and with it would go the state
that tells how it came about. So the step chooses, array by array, between what it has
computed and what it was given. The compiler does so where it writes a parameter's new
value anyway. The optimiser's old statistics are kept only where the run goes on: on
CPUs that takes the memory of a few arrays. This file knows no model and no loss.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from dpojax import metrics
from dpojax.metrics import Sums

# What a step does whose loss or gradient is not finite: hold the state as it is from
# then on, so that the run can look at it and end; or drop its own update.
OnNan = Literal["stop", "skip"]


def is_finite(sums: Sums) -> Bool[Array, ""]:
    """Whether a step's loss and the norm of its gradient are numbers.

    Args:
      sums: of the step; ``loss`` and ``grad_norm`` are looked at.
    """
    loss: metrics.LossSums = sums["loss"]
    examples, tokens = loss
    # As `metrics.summarize` divides; without examples there is no mean either.
    totals = jnp.stack([examples.total, tokens.total, sums["grad_norm"].total])
    return jnp.all(jnp.isfinite(totals)) & (examples.count != 0)


def choose(is_made: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new arrays of a tree where the update is made, else the old ones."""
    return jax.tree.map(partial(jnp.where, is_made), new, old)


def hold(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that is told whether its update is made, and else remembers nothing.

    As with `optax.apply_if_finite`, moments and their counts stay as they were. But
    schedules go on: like the order of the data they are functions of the step, so that
    the run ends at the rate that it was to end at, whatever was dropped.
    """

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        is_made: Bool[Array, ""] = extra["is_made"]
        updates, new = optimizer.update(updates, state, params)

        def held(new: Any, old: Any) -> Any:
            return new if _is_schedule(new) else choose(is_made, new, old)

        return updates, jax.tree.map(held, new, state, is_leaf=_is_schedule)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)
