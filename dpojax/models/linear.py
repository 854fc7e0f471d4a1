"""A projection: its kernel, plain or quantised, and what an adapter adds to it.

This file knows nothing of layers, files and training.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dpojax.expert_shards import ByShard, alone
from dpojax.kernel_exchange import KernelExchange
from dpojax.models.blockwise import blockwise_attention
from dpojax.models.lora import Lora, LoraShape
from dpojax.models.quantized import Quantization, QuantizedKernel
from dpojax.models.remat import Remat, as_projection
from dpojax.precision import precision_of

# (query, key, value, example, branch, window=, scale=, cap=) -> attended values
Attend = Callable[..., Array]
LookUp = Callable[[Array, Array], Array]  # (table, tokens) -> their rows


def take(table: Array, tokens: Array) -> Array:
    """Rows of a table that one device has."""
    return table[tokens]


def kernel_gradient(path: str, hidden: Array, slope: Array) -> Array:
    """``hidden^T slope`` ``[inputs, outputs]``, whatever the projection."""
    return _contract("rli,rlo->io", hidden, slope)


ALONE = KernelExchange(lambda path, kernel: kernel, kernel_gradient)


class Options(NamedTuple):
    """How a decoder computes, apart from its shape."""

    compute_dtype: Any
    param_dtype: Any
    remat: Remat
    constrain: Callable[[Array], Array]
    by_shard: ByShard = alone
    quantization: Quantization | None = None  # of projections' kernels
    lora: LoraShape | None = None
    attend: Attend = blockwise_attention
    look_up: LookUp = take
    exchange: KernelExchange = ALONE
    trunk: int = 0  # layers below the first that has adapters


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
        self.path, self.dtype = path, options.compute_dtype
        self.exchange = options.exchange
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
        product = multiply(self.path, self.exchange, hidden, kernel)
        if self.adapted:
            product = self.lora(hidden, kernel, product)
        if self.use_bias:
            product += self.bias[...].astype(self.dtype)
        return as_projection(product, self.path)


def _multiply(
    path: str,
    exchange: KernelExchange,
    hidden: Float[Array, "rows length inputs"],
    kernel: Float[Array, "inputs outputs"],
) -> Float[Array, "rows length outputs"]:
    """``hidden kernel``, with the kernel's gradient as ``hidden^T slope``.

    Of the two ways to compute that gradient, this transposes what the forward pass has
    already written. The usual one transposes the slope, into which XLA's compiler for
    CPUs fuses everything before it, in strides: a fifth of an MLP's time.
    """
    return _contract("rli,io->rlo", hidden, exchange.whole(path, kernel))


def _multiply_forward(
    path: str, exchange: KernelExchange, hidden: Array, kernel: Array
) -> tuple[Array, tuple]:
    # Not by calling multiply: what policies of rematerialisation name would be hidden.
    product = _contract("rli,io->rlo", hidden, exchange.whole(path, kernel))
    return product, (hidden, kernel)


def _multiply_backward(
    path: str, exchange: KernelExchange, operands: tuple[Array, Array], slope: Array
) -> tuple:
    hidden, kernel = operands
    by_hidden = _contract("rlo,io->rli", slope, exchange.whole(path, kernel))
    return by_hidden, exchange.gradient(path, hidden, slope)


multiply = jax.custom_vjp(_multiply, nondiff_argnums=(0, 1))
multiply.defvjp(_multiply_forward, _multiply_backward)


def _contract(indices: str, left: Array, right: Array) -> Array:
    precision = precision_of(left.dtype)
    return jnp.einsum(indices, left, right, precision=precision)
