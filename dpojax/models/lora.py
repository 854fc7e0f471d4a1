"""Low-rank adapters: what is trained beside a frozen base, as a pytree of its own.

An adapter adds ``scale (hidden A) B`` to a projection. Adapters stand in the tree of
parameters beside the kernels that they belong to, under ``lora``; without them the tree
is that of the base, which the same functions take. This file knows no files.

References:
  Hu et al., LoRA, 2021, arXiv:2106.09685, section 4.1.
  Kalajdzievski, rsLoRA, 2023, arXiv:2312.03732.
  Liu et al., DoRA, 2024, arXiv:2402.09353, section 4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from dpojax.models.functional import Params
from dpojax.models.quantized import dequantize


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """Which projections have adapters, and of what kind they are."""

    modules: frozenset[str]  # their paths in a layer, as attention/query
    rank: int
    alpha: float
    kind: Literal["lora", "dora"] = "lora"  # dora: outputs have trained magnitudes
    scaling: Literal["standard", "rslora"] = "standard"  # alpha / rank, or its root
    dropout: float = 0.0  # of what enters A, where the parameters carry random keys
    layers: int | None = None  # the last so many have adapters; None: all

    @property
    def scale(self) -> float:
        """What multiplies the product of the two matrices."""
        return self.alpha / self.divisor(self.rank)

    def trunk(self, num_layers: int) -> int:
        """How many layers of a model are below the first adapter."""
        return 0 if self.layers is None else num_layers - self.layers

    def divisor(self, rank: int) -> float:
        """What an alpha is divided by at a rank."""
        return math.sqrt(rank) if self.scaling == "rslora" else float(rank)


class Lora(nnx.Module):
    """One adapter: A ``[inputs, rank]`` and B ``[rank, outputs]``, float32.

    A starts uniform in ``±inputs^-1/2``, as PEFT's, and B at 0.
    """

    def __init__(self, shape: LoraShape, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.shape = shape
        bound, size = inputs**-0.5, (inputs, shape.rank)
        draw = jax.random.uniform(rngs.params(), size, minval=-bound, maxval=bound)
        self.a = nnx.Param(draw)
        self.b = nnx.Param(jnp.zeros((shape.rank, outputs)))
        if shape.kind == "dora":
            self.magnitude = nnx.Param(jnp.ones(outputs))
        if shape.dropout:
            self.dropout_key = nnx.Param(rngs.params())

    def __call__(self, hidden: Array, kernel: Array, product: Array) -> Array:
        """What the projection gives with the adapter; `product` is without."""
        shape, dtype = self.shape, product.dtype
        a, b = self.a[...].astype(dtype), self.b[...].astype(dtype)
        if shape.dropout:
            kept = 1 - shape.dropout
            mask = jax.random.bernoulli(self.dropout_key[...], kept, hidden.shape)
            hidden = jnp.where(mask, hidden / kept, 0)
        adapted = product + (hidden @ a) @ b * jnp.asarray(shape.scale, dtype)
        if shape.kind == "lora":
            return adapted
        # A constant, as in section 4.3 of the paper: no gradient passes the norm.
        norm = jax.lax.stop_gradient(
            adapted_norm(kernel, self.a[...], self.b[...], shape.scale)
        )
        return adapted * (self.magnitude[...] / norm).astype(dtype)


def adapted_norm(
    kernel: Float[Array, "inputs outputs"],
    a: Float[Array, "inputs rank"],
    b: Float[Array, "rank outputs"],
    scale: float,
) -> Float[Array, " outputs"]:
    """Norm of each output's weights, without a second matrix of the kernel's size."""
    kernel = kernel.astype(jnp.float32)
    cross = 2 * scale * (a.T @ kernel) + scale**2 * (a.T @ a) @ b
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=0) + jnp.sum(cross * b, axis=0))


# -- Trees of parameters --------------------------------------------------------------


class Frozen(NamedTuple):
    """The second argument of a step that trains adapters."""

    base: Params
    adapters: Params | None = None  # the reference's; None: the base is the reference

    @property
    def reference(self) -> Params:
        """The reference's parameters."""
        return self.base if self.adapters is None else graft(self.base, self.adapters)


def split_adapters(params: Params) -> tuple[Params, Params]:
    """The base, and what is trained: the adapters and a reward model's head.

    A head stays part of the base too, so that the base is a whole model.
    """
    flat = _flat(params)
    base = {path: leaf for path, leaf in flat.items() if "lora" not in path}
    trained = {
        path: leaf.astype(jnp.float32)
        for path, leaf in flat.items()
        if "lora" in path or path[0] == "score"
    }
    return unflatten_dict(base), unflatten_dict(trained)


def graft(base: Params, adapters: Params) -> Params:
    """The base with adapters in their places; no array is touched or copied."""
    return unflatten_dict(_flat(base) | _flat(adapters))


def start_adapters(base: Params, adapters: Params) -> Params:
    """Adapters such that at first the adapted model is the base.

    Of LoRA they are that as they are drawn; DoRA's magnitudes are the kernels' norms.
    """

    def magnitude(kernel: Array, lora: Params) -> Params:
        if "magnitude" not in lora:
            return {"lora": lora}
        norm = jax.vmap(partial(adapted_norm, scale=0.0))
        upper = kernel[-len(lora["a"]) :]
        return {"lora": lora | {"magnitude": norm(upper, lora["a"], lora["b"])}}

    return split_adapters(_map_adapted(magnitude, graft(base, adapters)))[1]


def merge_adapters(params: Params, shape: LoraShape) -> Params:
    """A model without adapters that computes what the adapted one does."""

    def merged(kernel: Array, a: Array, b: Array, magnitude: Array | None) -> Array:
        exact = kernel.astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            whole = exact + shape.scale * (a @ b)
            if magnitude is not None:
                whole *= magnitude / adapted_norm(kernel, a, b, shape.scale)
        return whole.astype(kernel.dtype)

    def merge(kernel: Array, lora: Params) -> Params:
        trunk = len(kernel) - len(lora["a"])
        parts = (kernel[trunk:], lora["a"], lora["b"], lora.get("magnitude"))
        return {"kernel": kernel.at[trunk:].set(jax.vmap(merged)(*parts))}

    return _map_adapted(merge, params)


def make_roles(shape: LoraShape, seed: int = 0) -> Callable[..., tuple[Params, Params]]:
    """``(adapters, frozen, step) -> (policy, reference)``, for the train step.

    Both take the arrays of one base. Dropout is of the policy alone, its masks decided
    by the seed, the step and the place in a microbatch's rows.
    """

    def roles(
        adapters: Params, frozen: Frozen, step: Int[Array, ""]
    ) -> tuple[Params, Params]:
        policy = graft(frozen.base, adapters)
        if shape.dropout:
            key = jax.random.fold_in(jax.random.key(seed), step)
            policy = graft(policy, _dropout_keys(adapters, key))
        return policy, frozen.reference

    return roles


def _flat(params: Params) -> dict[tuple[str, ...], Any]:
    flat: Any = flatten_dict(params)
    return flat


def _dropout_keys(adapters: Params, key: Array) -> Params:
    """A key for each layer of each adapter."""
    firsts = {path: leaf for path, leaf in _flat(adapters).items() if path[-1] == "a"}
    keys = {
        (*path[:-1], "dropout_key"): jax.random.split(
            jax.random.fold_in(key, i), len(leaf)
        )
        for i, (path, leaf) in enumerate(sorted(firsts.items()))
    }
    return unflatten_dict(keys)


def _map_adapted(function: Callable[[Array, Params], Params], params: Params) -> Params:
    """Updates each projection that has an adapter by a function of its kernel and it.

    What the function does not return of kernel and adapter is dropped.
    """
    if "lora" in params:
        rest = {
            name: leaf
            for name, leaf in params.items()
            if name not in ("kernel", "lora")
        }
        kernel = dequantize(params["kernel"])
        return rest | function(kernel, params["lora"])
    return {
        name: _map_adapted(function, leaf) if isinstance(leaf, dict) else leaf
        for name, leaf in params.items()
    }
