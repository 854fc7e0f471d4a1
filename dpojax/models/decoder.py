"""One decoder-only transformer, its variants by config, as pure functions.

Layers are stacked and scanned, so that a program's size and compile time do not grow
with depth; where layers differ, in window or rotary embedding, arrays are scanned
beside them that say how. The decoder knows the row layout, but no loss, no optimiser
and no mesh: where activations are to be pinned, the caller passes a function for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dpojax.batch import Batch
from dpojax.log_probs import Head, Output
from dpojax.models.attention import Window, attention
from dpojax.models.block import Block, Hidden, Options, make_norm
from dpojax.models.functional import Params, as_function
from dpojax.models.rotary import make_rotation, rotary_tables
from dpojax.models.shape import DecoderConfig, layer_ropes, layer_windows

NO_WINDOW = 2**30  # further than any position, so that it hides nothing


class Cache(NamedTuple):
    """Keys and values of the tokens so far, all layers."""

    key: Float[Array, "layers rows keys key_heads dimension"]
    value: Float[Array, "layers rows keys key_heads dimension"]


class Model(NamedTuple):
    """A decoder as pure functions of its parameters."""

    config: DecoderConfig
    params: Params  # shapes and dtypes, no arrays
    init: Callable[[Array], Params]  # key -> parameters
    # (params, batch) -> hidden states [rows, length, width], and what they meet
    apply: Callable[[Params, Batch], tuple[Array, Output]]
    # (params, tokens, position, example, cache, offset) -> the same and the new cache
    extend: Callable[..., tuple[Array, Output, Cache]]
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


class Decoder(nnx.Module):
    """Tokens to final hidden states."""

    def __init__(self, config: DecoderConfig, options: Options, rngs: nnx.Rngs):
        self.config = config
        self.options = options
        table = partial(_table, config, options, rngs)
        self.embedding = table(config.vocabulary_size, config.initializer_range)
        if config.positions == "learned":
            self.position = table(config.max_length, config.initializer_range)
        if config.head == "score":
            # Stiennon et al. 2020, appendix B.1: after a norm, rewards start at the
            # order of 1; from zeros, the decoder would get no gradient at first.
            self.score = table(1, (config.width + 1) ** -0.5)
        elif not config.tied_output:
            self.output = table(config.vocabulary_size, config.initializer_range)
        if config.head == "vocabulary" and config.head_bias:
            bias = jnp.zeros(config.vocabulary_size, options.param_dtype)
            self.output_bias = nnx.Param(bias)
        make_block = nnx.vmap(lambda rngs: Block(config, options, rngs))
        self.blocks = make_block(rngs.split(config.num_layers))
        self.norm = make_norm(config, options, rngs, config.width)

    def __call__(self, batch: Batch) -> tuple[Hidden, Output]:
        """Hidden states of each row; output matrix, or a score's ``[1, width]``."""
        example, branch = jnp.asarray(batch.example), jnp.asarray(batch.branch)
        tokens, position = jnp.asarray(batch.tokens), jnp.asarray(batch.position)

        def attend(
            query: Array, key: Array, value: Array, cache: None, layer: _Layer
        ) -> tuple[Array, None]:
            window = layer.window_over(position)
            attended = self._attention(
                query, key, value, example, branch, window=window
            )
            return attended, cache

        longest = None
        if _depends_on_length(self.config):
            num_examples = batch.completion_length.shape[1]
            longest = _longest_sequence(example, position, num_examples)
        hidden, _ = self._blocks(tokens, position, attend, None, longest)
        return hidden, self._head()

    def extend(
        self,
        tokens: Int[Array, "rows new"],
        position: Int[Array, "rows new"],
        example: Int[Array, "rows keys"],
        cache: Cache,
        offset: int | Int[Array, ""],
    ) -> tuple[Hidden, Output, Cache]:
        """Hidden states of new tokens, which enter the cache at `offset`.

        Where rotary frequencies depend on a length, it is that of the whole row: the
        prompt and all tokens that may follow, ``sum(example > 0)``. So queries agree
        with the keys in the cache. In `transformers` cached keys keep the rotation of
        the length at which they were made (Phi-3 alone computes them again when it
        crosses its original length); there is no difference where prompt and result
        are on one side of the original length, of longrope on either, of dynamic
        scaling within it.
        """
        prompt = jnp.zeros_like(example)  # one sequence a row, no branches
        key_position = jnp.cumsum(example > 0, axis=1) - 1

        def attend(
            query: Array, key: Array, value: Array, cache: Cache, layer: _Layer
        ) -> tuple[Array, Cache]:
            # All layers' caches are carried and written in place: as inputs and outputs
            # of the scan they would be copied whole for every token.
            place = (layer.index, 0, offset, 0, 0)
            cache = Cache(
                jax.lax.dynamic_update_slice(cache.key, key[None], place),
                jax.lax.dynamic_update_slice(cache.value, value[None], place),
            )
            keys, values = cache.key[layer.index], cache.value[layer.index]
            window = layer.window_over(key_position)
            attended = self._attention(
                query, keys, values, example, prompt, offset, window=window
            )
            return attended, cache

        longest = None
        if _depends_on_length(self.config):
            total = jnp.sum(example > 0, axis=1, keepdims=True)
            longest = jnp.broadcast_to(total, position.shape)
        hidden, cache = self._blocks(tokens, position, attend, cache, longest)
        return hidden, self._head(), cache

    def _attention(self, *args: Any, window: Window | None) -> Array:
        scale, cap = self.config.attention_scale, self.config.attention_cap
        return attention(*args, window=window, scale=scale, cap=cap)

    def _head(self) -> Output:
        config = self.config
        if config.head == "score":
            return self.score.embedding[...]
        table = self.embedding if config.tied_output else self.output
        matrix = table.embedding[...]
        if not config.head_bias and config.logit_cap is None:
            return matrix
        bias = self.output_bias[...] if config.head_bias else None
        return Head(matrix, bias, config.logit_cap)

    def _embed(self, tokens: Array, position: Array) -> Hidden:
        dtype, scale = self.options.compute_dtype, self.config.embedding_scale
        hidden = self.embedding.embedding[...][tokens].astype(dtype)
        if scale != 1:
            hidden = hidden * jnp.asarray(scale, dtype)
        if self.config.positions == "learned":
            hidden += self.position.embedding[...][position].astype(dtype)
        return hidden

    def _blocks(
        self,
        tokens: Array,
        position: Array,
        attend: Callable,
        cache: Cache | None,
        longest: Array | None,
    ) -> tuple[Hidden, Any]:
        config, dtype = self.config, self.options.compute_dtype
        constrain = self.options.constrain
        hidden = constrain(self._embed(tokens, position))
        rotation = _make_rotations(config, position, longest)

        def body(carry: tuple, block_and_layer: tuple) -> tuple[tuple, None]:
            (hidden, cache), (block, layer) = carry, block_and_layer
            rotate, attend_here = rotation(layer), partial(attend, layer=layer)
            hidden, cache = block(hidden, rotate, attend_here, cache)
            return (constrain(hidden), cache), None

        if self.options.remat:
            body = jax.checkpoint(body)
        # Accelerators would otherwise multiply float32 in fewer bits.
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
            carry, _ = jax.lax.scan(
                body, (hidden, cache), (self.blocks, _layers(config))
            )
        hidden, cache = carry
        hidden = self.norm(hidden)
        if config.logit_scale != 1 and config.head == "vocabulary":
            # Logits are linear in the hidden states, whose product is elsewhere.
            hidden = hidden * jnp.asarray(config.logit_scale, dtype)
        return hidden, cache


class _Layer(NamedTuple):
    """What is scanned beside the blocks: in what a layer differs from others."""

    index: Int[Array, "*layers"]
    window: Int[Array, "*layers"] | None  # None: no layer has one
    rope: Int[Array, "*layers"] | None  # of the different ones; None: all are alike

    def window_over(self, position: Array) -> Window | None:
        return None if self.window is None else Window(position, self.window)


def _layers(config: DecoderConfig) -> _Layer:
    windows, ropes = layer_windows(config), layer_ropes(config)
    kinds = list(dict.fromkeys(ropes))
    sizes = [NO_WINDOW if window is None else window for window in windows]
    return _Layer(
        jnp.arange(config.num_layers),
        None if set(windows) == {None} else jnp.array(sizes, jnp.int32),
        None if len(kinds) == 1 else jnp.array([kinds.index(rope) for rope in ropes]),
    )


def _depends_on_length(config: DecoderConfig) -> bool:
    ropes = layer_ropes(config)
    return any(rope is not None and rope.depends_on_length for rope in ropes)


def _longest_sequence(
    example: Int[Array, "rows length"],
    position: Int[Array, "rows length"],
    num_examples: int,
) -> Int[Array, "rows length"]:
    """Tokens of the longest sequence of each token's example, whatever its branch.

    So the two completions of a prompt are read with one set of frequencies, and what
    else a row or batch holds does not matter. A row does not hold the last token of a
    sequence, which predicts nothing; it does not count.
    """

    def of_row(example: Array, position: Array) -> Array:
        count = num_examples + 1  # and padding, whose number is 0
        return jax.ops.segment_max(position + 1, example, num_segments=count)[example]

    return jax.vmap(of_row)(example, position)


def _make_rotations(
    config: DecoderConfig,
    position: Int[Array, "rows length"],
    longest: Int[Array, "rows length"] | None,
) -> Callable[[_Layer], Callable[[Array], Array]]:
    """The rotation of each layer; angles are computed once, outside of the scan."""
    kinds = list(dict.fromkeys(layer_ropes(config)))
    if kinds == [None]:
        return lambda layer: lambda heads: heads
    dimension = config.rotary_dimension or config.head_dimension
    tables = [rotary_tables(rope, dimension, position, longest) for rope in kinds]
    if len(kinds) == 1:
        rotate = make_rotation(*tables[0], config.rotary_pairs)
        return lambda layer: rotate
    cosines, sines = (jnp.stack(table) for table in zip(*tables, strict=True))
    return lambda layer: make_rotation(
        cosines[layer.rope], sines[layer.rope], config.rotary_pairs
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
