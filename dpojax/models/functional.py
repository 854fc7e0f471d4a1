"""The seam between Flax and the rest: a module becomes a function and its parameters.

Above this seam parameters are nested dicts of arrays and every transformation is
JAX's. Only what means the same in NNX's graph mode and its tree mode is used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
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


def by_structure(
    functions: Sequence[tuple[Callable[..., Any], Params]],
) -> Callable[..., Any]:
    """Joins functions of parameters to one that calls the one whose tree it is given.

    Args:
      functions: as `as_function` gives them, the trees all different.

    Raises:
      ValueError: by what is returned, for parameters of none of the structures.
    """
    by_tree = {jax.tree.structure(params): apply for apply, params in functions}

    def apply(params: Params, *args: Any) -> Any:
        structure = jax.tree.structure(params)
        if structure not in by_tree:
            raise ValueError(f"The model has no parameters of the form {structure}.")
        return by_tree[structure](params, *args)

    return apply
