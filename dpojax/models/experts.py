"""Experts in the place of an MLP: a router sends each token to some of them.

Tokens are sorted by expert and multiplied group by group, so that the work is that of
the chosen experts alone and no token is dropped, however uneven the groups. This file
knows no rows of examples, no loss and no mesh: where rows are divided over devices, the
caller passes a function that keeps the sorting within each device's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dpojax.expert_shards import ByShard, ExpertShard
from dpojax.models.shape import DecoderConfig, ExpertShape
from dpojax.routing import Choice

Activation = Callable[[Array], Array]


class Experts(nnx.Module):
    """``sum_e w_e down_e(silu(gate_e(x)) * up_e(x))`` over the chosen experts e.

    The router is a product and, in float32 whatever the model computes in, a softmax
    over all experts; the most probable ones are chosen, with their probabilities as
    weights, which some families make to add up to 1.
    """

    def __init__(
        self,
        config: DecoderConfig,
        shape: ExpertShape,
        rngs: nnx.Rngs,
        *,
        activate: Activation,
        compute_dtype: Any,
        param_dtype: Any,
        by_shard: ByShard,
    ):
        self.shape, self.dtype = shape, compute_dtype
        self.activate, self.by_shard = activate, by_shard
        spread = config.initializer_range
        kernel = partial(Kernel, rngs, spread=spread, dtype=param_dtype)
        self.router = kernel((config.width, shape.number))
        self.gate = kernel((shape.number, config.width, shape.width))
        self.up = kernel((shape.number, config.width, shape.width))
        self.down = kernel((shape.number, shape.width, config.width))

    def __call__(
        self, hidden: Float[Array, "rows length width"]
    ) -> tuple[Float[Array, "rows length width"], Choice]:
        """What the chosen experts make of hidden states, and the router's choice."""
        # Not rounded to the dtype of the hidden states, as transformers rounds them:
        # experts that are nearly alike would become exactly alike.
        logits = jnp.einsum(
            "rlw,we->rle",
            hidden,
            self.router.kernel[...].astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        probability = jax.nn.softmax(logits, axis=-1)
        kernels = [
            part.kernel[...].astype(self.dtype)
            for part in (self.gate, self.up, self.down)
        ]
        # Left to the compiler, the choice and the sorting would gather all rows.
        mixed, index = self.by_shard(self._choose_and_mix)(
            kernels, (hidden, probability)
        )
        return mixed, Choice(probability, index)

    def _choose_and_mix(
        self, kernels: list[Array], rows: tuple[Array, Array], shard: ExpertShard
    ) -> tuple[Array, Array]:
        hidden, probability = rows
        weight, index = jax.lax.top_k(probability, self.shape.per_token)
        if self.shape.renormalised:
            weight /= jnp.sum(weight, axis=-1, keepdims=True)
        mixed = mix_experts(
            kernels,
            shard.gather((hidden, weight, index)),
            activate=self.activate,
            first=shard.first(len(kernels[0])),
        )
        return shard.scatter(mixed).astype(hidden.dtype), index


class Kernel(nnx.Module):
    """A kernel ``[inputs, outputs]``, or one for each expert."""

    def __init__(
        self, rngs: nnx.Rngs, shape: tuple[int, ...], *, spread: float, dtype: Any
    ):
        init = nnx.initializers.normal(spread)
        self.kernel = nnx.Param(init(rngs.params(), shape, dtype))


def mix_experts(
    kernels: list[Array],
    rows: tuple[
        Float[Array, "rows length width"],
        Float[Array, "rows length chosen"],
        Int[Array, "rows length chosen"],
    ],
    *,
    activate: Activation,
    first: Int[Array, ""] | None = None,
) -> Float[Array, "rows length width"]:
    """The weighted sum of what the chosen experts make of each token.

    Args:
      kernels: gate and up ``[experts, width, inside]``, down
        ``[experts, inside, width]``.
      rows: hidden states; the weights of each token's experts; and which those are.
      activate: between the products.
      first: given, the kernels are those of the experts from this on, and the sum is
        over these alone.

    Returns:
      The sum, in float32.
    """
    (gate, up, down), (hidden, weight, index) = kernels, rows
    chosen, num_experts = index.reshape(-1), len(gate)
    if first is not None:  # the others' copies come last, and belong to no group
        is_own = (chosen >= first) & (chosen < first + num_experts)
        chosen = jnp.where(is_own, chosen - first, num_experts)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=num_experts)
    # A copy of each token for each of its experts: so sorting is a permutation, and
    # its gradient one too, without a sum that depends on the order of threads.
    copies = jnp.repeat(hidden.reshape(-1, hidden.shape[-1]), index.shape[-1], axis=0)
    grouped = _permute(copies, order)
    in_group = (jnp.arange(len(chosen)) < jnp.sum(sizes))[:, None]
    if first is not None:  # what products make of the rest is not said, nor its slope
        grouped = jnp.where(in_group, grouped, 0)
    inside = activate(jax.lax.ragged_dot(grouped, gate, sizes))
    inside *= jax.lax.ragged_dot(grouped, up, sizes)
    outputs = jax.lax.ragged_dot(inside, down, sizes)
    if first is not None:
        outputs = jnp.where(in_group, outputs, 0)
    outputs = _permute(outputs, jnp.argsort(order))
    outputs = outputs.reshape(*index.shape, -1).astype(jnp.float32)
    return jnp.sum(outputs * weight[..., None], axis=-2)


def _permute(
    array: Float[Array, "tokens width"], order: Int[Array, " tokens"]
) -> Float[Array, "tokens width"]:
    return array.at[order].get(unique_indices=True, mode="promise_in_bounds")
