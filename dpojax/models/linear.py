"""A projection: its kernel, plain or quantised, and what an adapter adds to it.

This file knows nothing of layers, files and training.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dpojax.models.experts import ByShard, alone
from dpojax.models.lora import Lora, LoraShape
from dpojax.models.quantized import Quantization, QuantizedKernel
from dpojax.models.remat import Remat


class Options(NamedTuple):
    """How a decoder computes, apart from its shape."""

    compute_dtype: Any
    param_dtype: Any
    remat: Remat
    constrain: Callable[[Array], Array]
    by_shard: ByShard = alone
    quantization: Quantization | None = None  # of projections' kernels
    lora: LoraShape | None = None


class Linear(nnx.Module):
    """``hidden kernel + bias``, kernel ``[inputs, outputs]``; with an adapter, more."""

    def __init__(
        self,
        path: str,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool,
        spread: float,
        options: Options,
        rngs: nnx.Rngs,
    ):
        """Makes a projection.

        Args:
          path: its place in a layer, by which adapters are given: `attention/query`.
          inputs: what it maps from.
          outputs: what it maps to.
          use_bias: whether it has a bias.
          spread: standard deviation of the kernel's first values.
          options: how it computes.
          rngs: decides the values.
        """
        self.dtype = options.compute_dtype
        shape, dtype = (inputs, outputs), options.param_dtype
        if options.quantization is None:
            init = nnx.initializers.normal(spread)
            self.kernel = nnx.Param(init(rngs.params(), shape, dtype))
        else:
            self.kernel = QuantizedKernel(options.quantization, shape)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(outputs, dtype))
        self.use_bias = use_bias
        self.adapted = options.lora is not None and path in options.lora.modules
        if options.lora is not None and self.adapted:
            self.lora = Lora(options.lora, inputs, outputs, rngs)

    def __call__(self, hidden: Array) -> Array:
        """Hidden states ``[rows, length, inputs]`` to ``[rows, length, outputs]``."""
        kernel, hidden = self.kernel[...].astype(self.dtype), hidden.astype(self.dtype)
        product = hidden @ kernel
        if self.adapted:
            product = self.lora(hidden, kernel, product)
        return product + self.bias[...].astype(self.dtype) if self.use_bias else product
