"""The parts of a decoder: a layer, its attention, its MLP and their norms.

Which of them a layer has and how they are joined is the config's choice. Modules are
given the rotation and the attention function; they know no rows, cache or mesh.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dpojax.models.experts import Experts
from dpojax.models.linear import Linear, Options
from dpojax.models.shape import DecoderConfig
from dpojax.routing import Choice

Hidden = Float[Array, "rows length width"]
Norm = Callable[[Array], Array]
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Block(nnx.Module):
    """One layer: what attention and MLP make of the hidden states is added to them."""

    def __init__(self, config: DecoderConfig, options: Options, rngs: nnx.Rngs):
        self.config = config
        norm = partial(make_norm, config, options, rngs, config.width)
        if config.arrangement != "post":
            self.attention_norm = norm()
        self.attention = Attention(config, options, rngs)
        if config.arrangement in ("pre", "both", "parallel"):
            self.mlp_norm = norm()
        if config.experts is None:
            self.mlp = MLP(config, options, rngs)
        else:
            self.experts = Experts(
                config,
                config.experts,
                rngs,
                activate=ACTIVATIONS[config.activation],
                compute_dtype=options.compute_dtype,
                param_dtype=options.param_dtype,
                by_shard=options.by_shard,
            )
        if config.arrangement in ("post", "both"):
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()

    def __call__(
        self, hidden: Hidden, rotate: Callable, attend: Callable, cache: Any
    ) -> tuple[Hidden, Any, Choice | None]:
        arrangement, scale = self.config.arrangement, self.config.residual_scale
        normed = hidden if arrangement == "post" else self.attention_norm(hidden)
        attended, cache = self.attention(normed, rotate, attend, cache)
        if arrangement == "parallel":
            added, choice = self._feed(self.mlp_norm(hidden))
            return hidden + attended + added, cache, choice
        if arrangement == "parallel_one_norm":
            added, choice = self._feed(normed)
            return hidden + attended + added, cache, choice
        if arrangement != "pre":
            attended = self.attention_post_norm(attended)
        hidden += attended if scale == 1 else scale * attended
        normed = hidden if arrangement == "post" else self.mlp_norm(hidden)
        added, choice = self._feed(normed)
        if arrangement != "pre":
            added = self.mlp_post_norm(added)
        return hidden + (added if scale == 1 else scale * added), cache, choice

    def _feed(self, hidden: Hidden) -> tuple[Hidden, Choice | None]:
        """What the MLP makes of hidden states; or experts, and which those were."""
        if self.config.experts is None:
            return self.mlp(hidden), None
        return self.experts(hidden)


class Attention(nnx.Module):
    """Projections around a given attention function."""

    def __init__(self, config: DecoderConfig, options: Options, rngs: nnx.Rngs):
        self.config = config
        linear = partial(make_linear, config, options, rngs)
        query_width = config.num_heads * config.head_dimension
        key_width = config.num_key_heads * config.head_dimension
        self.query = linear(
            "attention/query", config.width, query_width, config.qkv_bias
        )
        self.key = linear("attention/key", config.width, key_width, config.qkv_bias)
        self.value = linear("attention/value", config.width, key_width, config.qkv_bias)
        self.output = linear(
            "attention/output", query_width, config.width, config.output_bias
        )
        if config.query_key_norm != "none":
            by_head = config.query_key_norm == "head"
            norm = partial(make_norm, config, options, rngs)
            self.query_norm = norm(config.head_dimension if by_head else query_width)
            self.key_norm = norm(config.head_dimension if by_head else key_width)

    def __call__(
        self, hidden: Hidden, rotate: Callable, attend: Callable, cache: Any
    ) -> tuple[Hidden, Any]:
        query, key = self._query_and_key(hidden)
        value = self._as_heads(self.value(hidden))
        attended, cache = attend(rotate(query), rotate(key), value, cache)
        attended = attended.reshape(*hidden.shape[:2], -1)
        return self.output(attended), cache

    def _query_and_key(self, hidden: Hidden) -> tuple[Array, Array]:
        query, key, as_heads = self.query(hidden), self.key(hidden), self._as_heads
        if self.config.query_key_norm == "none":
            return as_heads(query), as_heads(key)
        if self.config.query_key_norm == "head":
            return self.query_norm(as_heads(query)), self.key_norm(as_heads(key))
        return as_heads(self.query_norm(query)), as_heads(self.key_norm(key))

    def _as_heads(self, projected: Array) -> Array:
        return projected.reshape(*projected.shape[:2], -1, self.config.head_dimension)


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``; without a gate, ``down(gelu(up(x)))``."""

    def __init__(self, config: DecoderConfig, options: Options, rngs: nnx.Rngs):
        self.config = config
        linear = partial(make_linear, config, options, rngs)
        if config.mlp == "gated":
            self.gate = linear(
                "mlp/gate", config.width, config.mlp_width, config.mlp_bias
            )
        self.up = linear("mlp/up", config.width, config.mlp_width, config.mlp_bias)
        self.down = linear("mlp/down", config.mlp_width, config.width, config.mlp_bias)

    def __call__(self, hidden: Hidden) -> Hidden:
        activate = ACTIVATIONS[self.config.activation]
        if self.config.mlp == "gated":
            return self.down(activate(self.gate(hidden)) * self.up(hidden))
        return self.down(activate(self.up(hidden)))


class NormFromOne(nnx.Module):
    """RMSNorm times ``1 + scale``, all of it in float32, as Gemma does."""

    def __init__(self, config: DecoderConfig, options: Options, size: int):
        self.dtype, self.epsilon = options.compute_dtype, config.norm_epsilon
        self.scale = nnx.Param(jnp.zeros(size, options.param_dtype))

    def __call__(self, hidden: Array) -> Array:
        exact = hidden.astype(jnp.float32)
        variance = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
        scale = 1 + self.scale[...].astype(jnp.float32)
        normed = exact * jax.lax.rsqrt(variance + self.epsilon)
        return (normed * scale).astype(self.dtype)


def make_norm(
    config: DecoderConfig, options: Options, rngs: nnx.Rngs, size: int
) -> Norm:
    """The norm of the config, over `size` numbers."""
    if config.norm == "rms_from_one":
        return NormFromOne(config, options, size)
    settings = {
        "epsilon": config.norm_epsilon,
        "dtype": options.compute_dtype,
        "param_dtype": options.param_dtype,
    }
    if config.norm == "layer":
        # The fast variance subtracts two large numbers.
        return nnx.LayerNorm(size, use_fast_variance=False, rngs=rngs, **settings)
    return nnx.RMSNorm(size, rngs=rngs, **settings)


def make_linear(
    config: DecoderConfig,
    options: Options,
    rngs: nnx.Rngs,
    path: str,
    inputs: int,
    outputs: int,
    use_bias: bool = False,
) -> Linear:
    """A projection, its kernel ``[inputs, outputs]``."""
    return Linear(
        path,
        inputs,
        outputs,
        use_bias=use_bias,
        spread=config.initializer_range,
        options=options,
        rngs=rngs,
    )
