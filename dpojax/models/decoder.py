"""One decoder-only transformer of the Llama and Qwen2 kind, its variants by config.

RMSNorm before each block, rotary embedding, grouped-query attention, gated MLP. Layers
are stacked and scanned, so that a program's size and compile time do not grow with
depth. Modules know the row layout, but no loss, no optimiser and no mesh: where
activations are to be pinned, the caller passes a function that does it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dpojax.batch import Batch
from dpojax.models.attention import attention
from dpojax.models.functional import Params, as_function

Hidden = Float[Array, "rows length width"]


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's stretching of the slow rotary frequencies, as in `transformers`."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int  # positions that the model was pre-trained on


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder."""

    vocabulary_size: int
    width: int
    num_layers: int
    num_heads: int
    num_key_heads: int  # fewer than num_heads: grouped queries
    head_dimension: int
    mlp_width: int
    norm_epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | None = None
    qkv_bias: bool = False
    tied_output: bool = False  # the output matrix is the embedding
    # What final hidden states meet: the output matrix, or a reward model's one row.
    head: Literal["vocabulary", "score"] = "vocabulary"
    max_length: int = 2048  # positions that the model is meant for
    initializer_range: float = 0.02


class Cache(NamedTuple):
    """Keys and values of the tokens so far, all layers."""

    key: Float[Array, "layers rows keys key_heads dimension"]
    value: Float[Array, "layers rows keys key_heads dimension"]


class Model(NamedTuple):
    """A decoder as pure functions of its parameters."""

    config: DecoderConfig
    params: Params  # shapes and dtypes, no arrays
    init: Callable[[Array], Params]  # key -> parameters
    # (params, batch) -> hidden states [rows, length, width], the head [., width]
    apply: Callable[[Params, Batch], tuple[Array, Array]]
    # (params, tokens, position, example, cache, offset) -> the same and the new cache
    extend: Callable[..., tuple[Array, Array, Cache]]
    empty_cache: Callable[[int, int], Cache]  # (rows, keys) -> cache


def make_model(
    config: DecoderConfig,
    *,
    compute_dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: bool = True,
    constrain: Callable[[Array], Array] = lambda hidden: hidden,
) -> Model:
    """Builds a decoder; nothing is allocated.

    Args:
      config: its shape.
      compute_dtype: dtype of activations and matrix products.
      param_dtype: dtype in which parameters are kept.
      remat: recompute each layer in the backward pass instead of keeping its inside.
      constrain: pins the sharding of hidden states ``[rows, length, width]``.

    Returns:
      The model's functions.
    """

    def make(key: Array) -> Decoder:
        options = Options(compute_dtype, param_dtype, remat, constrain)
        return Decoder(config, options, nnx.Rngs(key))

    abstract = nnx.eval_shape(make, jax.random.key(0))
    apply, params = as_function(abstract)
    extend, _ = as_function(abstract, Decoder.extend)

    def empty_cache(num_rows: int, num_keys: int) -> Cache:
        heads, dimension = config.num_key_heads, config.head_dimension
        shape = (config.num_layers, num_rows, num_keys, heads, dimension)
        zeros = partial(jnp.zeros, shape, compute_dtype)
        return Cache(zeros(), zeros())

    return Model(
        config,
        params,
        lambda key: as_function(make(key))[1],
        apply,
        extend,
        empty_cache,
    )


class Options(NamedTuple):
    """How a decoder computes, apart from its shape."""

    compute_dtype: Any
    param_dtype: Any
    remat: bool
    constrain: Callable[[Array], Array]


class Decoder(nnx.Module):
    """Tokens to final hidden states."""

    def __init__(self, config: DecoderConfig, options: Options, rngs: nnx.Rngs):
        self.config = config
        self.options = options
        table = partial(_table, config, options, rngs)
        self.embedding = table(config.vocabulary_size, config.initializer_range)
        if config.head == "score":
            # Stiennon et al. 2020, appendix B.1: after a norm, rewards start at the
            # order of 1; from zeros, the decoder would get no gradient at first.
            self.score = table(1, (config.width + 1) ** -0.5)
        elif not config.tied_output:
            self.output = table(config.vocabulary_size, config.initializer_range)
        make_block = nnx.vmap(lambda rngs: Block(config, options, rngs))
        self.blocks = make_block(rngs.split(config.num_layers))
        self.norm = _norm(config, options, rngs)

    def __call__(self, batch: Batch) -> tuple[Hidden, Array]:
        """Hidden states of each row; output matrix, or a score's ``[1, width]``."""
        example, branch = jnp.asarray(batch.example), jnp.asarray(batch.branch)

        def attend(
            query: Array, key: Array, value: Array, cache: None, layer: Array
        ) -> tuple[Array, None]:
            return attention(query, key, value, example, branch), cache

        tokens, position = jnp.asarray(batch.tokens), jnp.asarray(batch.position)
        hidden, _ = self._blocks(tokens, position, attend, None)
        return hidden, self._head_matrix()

    def extend(
        self,
        tokens: Int[Array, "rows new"],
        position: Int[Array, "rows new"],
        example: Int[Array, "rows keys"],
        cache: Cache,
        offset: int | Int[Array, ""],
    ) -> tuple[Hidden, Array, Cache]:
        """Hidden states of new tokens, which enter the cache at `offset`."""
        prompt = jnp.zeros_like(example)  # one sequence a row, no branches

        def attend(
            query: Array, key: Array, value: Array, cache: Cache, layer: Array
        ) -> tuple[Array, Cache]:
            # All layers' caches are carried and written in place: as inputs and outputs
            # of the scan they would be copied whole for every token.
            place = (layer, 0, offset, 0, 0)
            cache = Cache(
                jax.lax.dynamic_update_slice(cache.key, key[None], place),
                jax.lax.dynamic_update_slice(cache.value, value[None], place),
            )
            keys, values = cache.key[layer], cache.value[layer]
            return attention(query, keys, values, example, prompt, offset), cache

        hidden, cache = self._blocks(tokens, position, attend, cache)
        return hidden, self._head_matrix(), cache

    def _head_matrix(self) -> Array:
        if self.config.head == "score":
            return self.score.embedding[...]
        table = self.embedding if self.config.tied_output else self.output
        return table.embedding[...]

    def _blocks(
        self, tokens: Array, position: Array, attend: Callable, cache: Cache | None
    ) -> tuple[Hidden, Any]:
        dtype, constrain = self.options.compute_dtype, self.options.constrain
        hidden = constrain(self.embedding.embedding[...][tokens].astype(dtype))
        rotate = make_rotation(self.config, position)

        def body(carry: tuple, block_and_layer: tuple) -> tuple[tuple, None]:
            (hidden, cache), (block, layer) = carry, block_and_layer
            hidden, cache = block(hidden, rotate, partial(attend, layer=layer), cache)
            return (constrain(hidden), cache), None

        if self.options.remat:
            body = jax.checkpoint(body)
        # Accelerators would otherwise multiply float32 in fewer bits.
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
            layers = jnp.arange(self.config.num_layers)
            carry, _ = jax.lax.scan(body, (hidden, cache), (self.blocks, layers))
        hidden, cache = carry
        return self.norm(hidden), cache


class Block(nnx.Module):
    """One layer: attention and MLP, each on the norm of its input, added to it."""

    def __init__(self, config: DecoderConfig, options: Options, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, options, rngs)
        self.attention = Attention(config, options, rngs)
        self.mlp_norm = _norm(config, options, rngs)
        self.mlp = MLP(config, options, rngs)

    def __call__(
        self, hidden: Hidden, rotate: Callable, attend: Callable, cache: Any
    ) -> tuple[Hidden, Any]:
        attended, cache = self.attention(
            self.attention_norm(hidden), rotate, attend, cache
        )
        hidden += attended
        return hidden + self.mlp(self.mlp_norm(hidden)), cache


class Attention(nnx.Module):
    """Projections around a given attention function."""

    def __init__(self, config: DecoderConfig, options: Options, rngs: nnx.Rngs):
        self.head_dimension = config.head_dimension
        linear = partial(_linear, config, options, rngs)
        query_width = config.num_heads * config.head_dimension
        key_width = config.num_key_heads * config.head_dimension
        self.query = linear(config.width, query_width, config.qkv_bias)
        self.key = linear(config.width, key_width, config.qkv_bias)
        self.value = linear(config.width, key_width, config.qkv_bias)
        self.output = linear(query_width, config.width)

    def __call__(
        self, hidden: Hidden, rotate: Callable, attend: Callable, cache: Any
    ) -> tuple[Hidden, Any]:
        def as_heads(projected: Array) -> Array:
            return projected.reshape(*projected.shape[:2], -1, self.head_dimension)

        query = rotate(as_heads(self.query(hidden)))
        key = rotate(as_heads(self.key(hidden)))
        attended, cache = attend(query, key, as_heads(self.value(hidden)), cache)
        return self.output(attended.reshape(*hidden.shape[:2], -1)), cache


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, options: Options, rngs: nnx.Rngs):
        linear = partial(_linear, config, options, rngs)
        self.gate = linear(config.width, config.mlp_width)
        self.up = linear(config.width, config.mlp_width)
        self.down = linear(config.mlp_width, config.width)

    def __call__(self, hidden: Hidden) -> Hidden:
        return self.down(jax.nn.silu(self.gate(hidden)) * self.up(hidden))


def _norm(config: DecoderConfig, options: Options, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.width,
        epsilon=config.norm_epsilon,
        dtype=options.compute_dtype,
        param_dtype=options.param_dtype,
        rngs=rngs,
    )


def _table(
    config: DecoderConfig, options: Options, rngs: nnx.Rngs, rows: int, spread: float
) -> nnx.Embed:
    return nnx.Embed(
        rows,
        config.width,
        param_dtype=options.param_dtype,
        embedding_init=nnx.initializers.normal(spread),
        rngs=rngs,
    )


def _linear(
    config: DecoderConfig,
    options: Options,
    rngs: nnx.Rngs,
    inputs: int,
    outputs: int,
    use_bias: bool = False,
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=options.compute_dtype,
        param_dtype=options.param_dtype,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        rngs=rngs,
    )


def rotary_frequencies(config: DecoderConfig) -> Float[np.ndarray, " half"]:
    """Angle per position of each pair of dimensions, in radians.

    References:
      Su et al., RoFormer, 2021, arXiv:2104.09864, section 3.2.2; for the scaling,
      `transformers.modeling_rope_utils`, rope type "llama3".
    """
    exponents = np.arange(0, config.head_dimension, 2) / config.head_dimension
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies.astype(np.float32)
    scaling = config.rope_scaling
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    # 0 where a pair turns too seldom to have been seen whole, 1 where often enough.
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def make_rotation(
    config: DecoderConfig, position: Int[Array, "rows length"]
) -> Callable[[Array], Array]:
    """The rotary embedding of given positions, as a function of queries or keys."""
    angle = position[..., None].astype(jnp.float32) * rotary_frequencies(config)
    cosine, sine = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]

    def rotate(heads: Float[Array, "rows length heads dimension"]) -> Array:
        first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
        rotated = (first * cosine - second * sine, second * cosine + first * sine)
        return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)

    return rotate
