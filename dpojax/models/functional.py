"""The seam between Flax and the rest: a module becomes a function and its parameters.

Above this seam parameters are nested dicts of arrays and every transformation is
JAX's. Only what means the same in NNX's graph mode and its tree mode is used. What a
module computes, and what is done with the function, are not this file's concern.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import singledispatch
from typing import Any

import jax
from flax import core, linen, nnx

Params = Any  # nested dicts of arrays
Function = tuple[Callable[..., Any], Params]


@singledispatch
def as_function(module: Any, method: Callable[..., Any] | None = None) -> Function:
    """Splits a Flax module, of NNX or of Linen, into a pure function and parameters.

    Args:
      module: an NNX module; or a Linen module bound to its variables,
        ``module.bind(module.init(key, batch))``. It may be abstract, and holds
        parameters alone.
      method: the function of the module's class to call; by default its ``__call__``.

    Returns:
      ``apply(params, *args)`` and ``params``, nested dicts of arrays.

    Raises:
      ValueError: for what is no Flax module, a Linen module without its variables, or
        a module that holds other state than parameters.
    """
    raise ValueError(
        f"A {type(module).__name__} is no Flax module; a function of parameters and a "
        "batch needs no conversion, give it where apply is asked for."
    )


@as_function.register
def _(module: nnx.Module, method: Callable[..., Any] | None = None) -> Function:
    graph, state, others = nnx.split(module, nnx.Param, ...)
    _check_only_params(module, {v.type.__name__ for _, v in nnx.to_flat_state(others)})
    call = type(module).__call__ if method is None else method

    def apply(params: Params, *args: Any) -> Any:
        return call(nnx.merge(graph, params), *args)

    return apply, nnx.to_pure_dict(state)


@as_function.register
def _(module: linen.Module, method: Callable[..., Any] | None = None) -> Function:
    name = type(module).__name__
    if module.scope is None:
        raise ValueError(
            f"The Linen module {name} has no variables yet; give "
            "module.bind(module.init(key, batch))."
        )
    definition, variables = module.unbind()
    _check_only_params(module, variables.keys() - {"params"})

    def apply(params: Params, *args: Any) -> Any:
        return definition.apply({"params": params}, *args, method=method)

    return apply, core.unfreeze(linen.unbox(variables["params"]))


def _check_only_params(module: Any, others: Iterable[str]) -> None:
    """Names of kinds of state are NNX's classes of variables, Linen's collections."""
    if others := sorted(others):
        raise ValueError(
            f"{type(module).__name__} holds {', '.join(others)} beside parameters, "
            "which a training step would not keep; build it without layers that have "
            "such state (batch statistics, dropout's keys)."
        )


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
