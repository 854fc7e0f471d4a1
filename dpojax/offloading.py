"""Arrays that wait in the host's memory until the step needs them.

An optimiser's statistics are used once a step, at its end, a reference once, before the
backward pass: between, the device's memory serves activations. This file knows no model
and no optimiser.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

_HOST = "pinned_host"


def on_host(shardings: Any, tree: Any) -> Any:
    """The same shardings in the host's memory; numbers such as counts stay.

    Args:
      shardings: one for each array.
      tree: the arrays, or their shapes.
    """

    def choose(array: Any, sharding: Any) -> Any:
        return sharding.with_memory_kind(_HOST) if array.ndim else sharding

    return jax.tree.map(choose, tree, shardings)


def put_on_host(tree: Any) -> Any:
    """Moves arrays that are on devices."""
    where = jax.tree.map(lambda array: array.sharding, tree)
    return jax.device_put(tree, on_host(where, tree))


def fetch(tree: Any) -> Any:
    """Inside a jitted function: the arrays on the device; those there stay as they are.

    Used where an array is needed, not where it enters: the compiler moves it there.
    """
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def fetch_parameters(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A model whose parameters may be in the host's memory."""
    return lambda params, *args: apply(fetch(params), *args)


def fetch_state(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser whose state is in the host's memory, and goes back there."""
    inner = optax.with_extra_args_support(optimizer)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        updates, new = inner.update(updates, fetch(state), params, **extra)
        return updates, jax.tree.map(_return, new)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _return(array: Any) -> Any:
    return jax.device_put(array, jax.memory.Space.Host) if array.ndim else array
