"""The seam between Flax and the rest: a module becomes a function and its parameters.

Above this seam parameters are nested dicts of arrays and every transformation is
JAX's. Only what means the same in NNX's graph mode and its tree mode is used.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx

Params = Any  # nested dicts of arrays


def as_function(
    module: nnx.Module, method: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], Params]:
    """Splits a module into a pure function and its parameters.

    Args:
      module: an NNX module whose only state is `nnx.Param`; it may be abstract.
      method: the function of the module to call; by default its ``__call__``.

    Returns:
      ``apply(params, *args)`` and ``params``, nested dicts of arrays.

    Raises:
      ValueError: by NNX, if the module holds other state than `nnx.Param`.
    """
    graph, state = nnx.split(module, nnx.Param)
    call = type(module).__call__ if method is None else method

    def apply(params: Params, *args: Any) -> Any:
        return call(nnx.merge(graph, params), *args)

    return apply, nnx.to_pure_dict(state)
