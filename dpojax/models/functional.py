"""The seam between Flax and the rest: a module becomes a function and its parameters.

Above this seam parameters are nested dicts of arrays and every transformation is
JAX's. Of NNX only what means the same in its graph mode and its tree mode is used.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from flax import core, linen, nnx

Params = Any  # nested dicts of arrays


def as_function(
    module: nnx.Module | linen.Module, method: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], Params]:
    """Splits a module into a pure function and its parameters.

    Args:
      module: an NNX module; or a Linen module with its variables, as
        ``module.bind(module.init(key, batch))`` is. Either may be abstract.
      method: the function of the module to call; by default its ``__call__``.

    Returns:
      ``apply(params, *args)`` and ``params``, nested dicts of arrays.

    Raises:
      ValueError: if the module holds other state than parameters; for a Linen module
        without variables.
    """
    if isinstance(module, nnx.Module):
        return _nnx_as_function(module, method)
    return _linen_as_function(module, method)


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


def _nnx_as_function(
    module: nnx.Module, method: Callable[..., Any] | None
) -> tuple[Callable[..., Any], Params]:
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    _refuse(
        module, {type(variable).__name__ for _, variable in nnx.to_flat_state(rest)}
    )
    call = type(module).__call__ if method is None else method

    def apply(params: Params, *args: Any) -> Any:
        return call(nnx.merge(graph, params), *args)

    return apply, nnx.to_pure_dict(state)


def _linen_as_function(
    module: linen.Module, method: Callable[..., Any] | None
) -> tuple[Callable[..., Any], Params]:
    name = type(module).__name__
    if module.scope is None:
        raise ValueError(
            f"The Linen module {name} has no variables; give them with it, as "
            "module.bind(module.init(key, batch))."
        )
    unbound, variables = module.unbind()
    _refuse(module, set(variables) - {"params"})
    # Neither frozen dicts nor names of axes: arrays in dicts.
    params = linen.unbox(core.unfreeze(dict(variables)))["params"]

    def apply(params: Params, *args: Any) -> Any:
        return unbound.apply({"params": params}, *args, method=method)

    return apply, params


def _refuse(module: nnx.Module | linen.Module, others: Collection[str]) -> None:
    """Refuses state that a pure function of the parameters would lose."""
    if others:
        raise ValueError(
            f"The module {type(module).__name__} holds {', '.join(sorted(others))} "
            "besides parameters, which alone are trained and kept; leave out the "
            "layers that hold it, such as batch normalisation and dropout."
        )
