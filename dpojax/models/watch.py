"""What is to be known of hidden states besides: nothing, or how large they are."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.models.block import Hidden

Watch = Callable[[Hidden], Any]  # of the states before the first layer and after each


def unwatched(hidden: Hidden) -> None:
    """Nothing."""


def largest(hidden: Hidden) -> Float[Array, "rows length"]:
    """The largest magnitude in each state."""
    return jnp.max(magnitude(hidden), axis=-1).astype(jnp.float32)


def magnitude(array: Float[Array, "..."]) -> Float[Array, "..."]:
    """Magnitudes; infinite where there is no finite number.

    A maximum need not see what is no number: on CPUs it passes over it.
    """
    return jnp.where(jnp.isfinite(array), jnp.abs(array), jnp.inf)
