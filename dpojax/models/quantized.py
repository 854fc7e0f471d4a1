"""Kernels of a frozen base in 8 or 4 bits, by qwix. Knows no layers and no files.

In the tree of parameters a quantised kernel is two arrays, ``values`` and ``scale``.
int8 has one scale for each output; nf4 (QLoRA's NormalFloat) one for every 64 inputs of
an output, or as many of them as divide the inputs.

References:
  Dettmers et al., QLoRA, 2023, arXiv:2305.14314, section 3.
"""

import math
from collections.abc import Callable
from types import EllipsisType
from typing import Literal

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jaxtyping import Array, Float

from dpojax.models.functional import Params

Quantization = Literal["int8", "nf4"]


class QuantizedKernel(nnx.Module):
    """A kernel ``[inputs, outputs]`` that is read like a parameter."""

    def __init__(self, kind: Quantization, shape: tuple[int, int]):
        blank = quantize(jnp.zeros(shape), kind)
        self.values = nnx.Param(blank["values"])
        self.scale = nnx.Param(blank["scale"])

    def __getitem__(self, whole: EllipsisType) -> Array:
        """The kernel in float32."""
        return dequantize({"values": self.values[...], "scale": self.scale[...]})


def quantize(kernel: Float[Array, "inputs outputs"], kind: Quantization) -> Params:
    """Values and scales of one kernel."""
    tiles = {0: math.gcd(kernel.shape[0], 64)} if kind == "nf4" else {}
    packed = qwix.quantize(
        kernel.astype(jnp.float32),
        jnp.int8 if kind == "int8" else kind,
        channelwise_axes=(1,),
        tiled_axes=tiles,
    )
    return {"values": packed.qvalue, "scale": packed.scale}


def dequantize(kernel: Array | Params) -> Array:
    """A kernel in float32 from its values and scales; a plain one as it is.

    Kernels of several layers are stacked along the first axis.
    """
    if not isinstance(kernel, dict):
        return kernel
    values, scale = kernel["values"], kernel["scale"]
    kind = "nf4" if values.dtype == jnp.uint4 else values.dtype
    return qwix.dequantize(qwix.QArray(values, scale, None, kind))


def make_quantize(
    kind: Quantization | None,
) -> Callable[[str, Array], Array | Params]:
    """``(path, array) -> array``; of stacked kernels it gives values and scales."""
    if kind is None:
        return lambda path, array: array

    # Layer after layer: no more than one kernel is held in float32.
    @jax.jit
    def quantize_stacked(array: Array) -> Params:
        return jax.lax.map(lambda layer: quantize(layer, kind), array)

    def convert(path: str, array: Array) -> Array | Params:
        is_kernel = path.startswith("blocks/") and path.endswith("/kernel")
        return quantize_stacked(array) if is_kernel else array

    return convert
