"""One decoder-only transformer, its variants by config, as pure functions.

Layers are stacked and scanned, so that a program's size and compile time do not grow
with depth; where layers differ, in window or rotary embedding, arrays are scanned
beside them that say how. The decoder knows the row layout, but no loss, no optimiser
and no mesh: where activations are to be pinned, the caller passes a function for it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dpojax.batch import Batch
from dpojax.expert_shards import ByShard, alone
from dpojax.kernel_exchange import KernelExchange
from dpojax.log_probs import Head, Output
from dpojax.models.attention import attention
from dpojax.models.block import Block, Hidden, make_norm
from dpojax.models.blockwise import blockwise_attention
from dpojax.models.functional import Params, as_function, by_structure
from dpojax.models.layers import (
    Layer,
    depends_on_length,
    longest_sequences,
    make_rotations,
    stack_layers,
)
from dpojax.models.linear import ALONE, Attend, LookUp, Options, take
from dpojax.models.lora import LoraShape, split_adapters
from dpojax.models.quantized import Quantization
from dpojax.models.remat import Remat, as_residual, rematerialize
from dpojax.models.shape import DecoderConfig
from dpojax.models.watch import Watch, largest, unwatched
from dpojax.routing import Routing, count_choices


class Cache(NamedTuple):
    """Keys and values of the tokens so far, all layers."""

    key: Float[Array, "layers rows keys key_heads dimension"]
    value: Float[Array, "layers rows keys key_heads dimension"]


class Model(NamedTuple):
    """A decoder as pure functions of its parameters."""

    config: DecoderConfig
    params: Params  # shapes and dtypes, no arrays
    init: Callable[[Array], Params]  # key -> parameters
    init_adapters: Callable[[Array], Params]  # key -> adapters, as `lora` has them
    # (params, batch) -> hidden states [rows, length, width], and what they meet
    apply: Callable[[Params, Batch], tuple[Array, Output]]
    # (params, batch) -> sizes of hidden states [stages, rows, length], see `trace`
    trace: Callable[[Params, Batch], Array]
    # (params, tokens, position, example, cache, offset) -> as apply, and the new cache
    extend: Callable[..., tuple[Array, Output, Cache]]
    empty_cache: Callable[[int, int], Cache]  # (rows, keys) -> cache
    lora: LoraShape | None
    quantization: Quantization | None


def make_model(
    config: DecoderConfig,
    *,
    compute_dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: Remat = "full",
    constrain: Callable[[Array], Array] = lambda hidden: hidden,
    by_shard: ByShard = alone,
    quantization: Quantization | None = None,
    lora: LoraShape | None = None,
    attend: Attend = blockwise_attention,
    look_up: LookUp = take,
    exchange: KernelExchange = ALONE,
) -> Model:
    """Builds a decoder; nothing is allocated.

    Args:
      config: its shape.
      compute_dtype: dtype of activations and matrix products.
      param_dtype: dtype in which parameters are kept.
      remat: what the backward pass keeps of each layer, see `dpojax.models.remat`.
      constrain: pins the sharding of hidden states ``[rows, length, width]``.
      by_shard: makes experts be computed by each shard of rows for itself.
      quantization: kernels may be quantised so, see `dpojax.models.quantized`.
      lora: the parameters may hold such adapters, see `dpojax.models.lora`.
      attend: attention over whole rows; to a cache, `attention` is used.
      look_up: reads the tokens' rows of the embedding.
      exchange: what devices exchange of the kernels that they share.

    Returns:
      The model's functions. They take parameters with and without adapters, and with
      the keys of dropout; which of these a tree has decides what is computed.
    """

    def make(options: Options, key: Array) -> Decoder:
        return Decoder(config, options, nnx.Rngs(key))

    plain = Options(
        compute_dtype,
        param_dtype,
        remat,
        constrain,
        by_shard,
        attend=attend,
        look_up=look_up,
        exchange=exchange,
    )
    without_dropout = None if lora is None else replace(lora, dropout=0.0)
    variants = dict.fromkeys(
        plain._replace(quantization=kind, lora=shape)
        for kind, shape in product((None, quantization), (None, without_dropout, lora))
    )
    modules = [
        nnx.eval_shape(partial(make, options), jax.random.key(0))
        for options in variants
    ]

    def empty_cache(num_rows: int, num_keys: int) -> Cache:
        heads, dimension = config.num_key_heads, config.head_dimension
        shape = (config.num_layers, num_rows, num_keys, heads, dimension)
        zeros = partial(jnp.zeros, shape, compute_dtype)
        return Cache(zeros(), zeros())

    def init(key: Array) -> Params:
        return as_function(make(plain, key))[1]

    def init_adapters(key: Array) -> Params:
        assert lora is not None
        options = plain._replace(lora=without_dropout)
        return split_adapters(as_function(make(options, key))[1])[1]

    return Model(
        config=config,
        params=as_function(modules[0])[1],
        init=init,
        init_adapters=init_adapters,
        apply=by_structure([as_function(module) for module in modules]),
        trace=by_structure([as_function(module, Decoder.trace) for module in modules]),
        extend=by_structure(
            [as_function(module, Decoder.extend) for module in modules]
        ),
        empty_cache=empty_cache,
        lora=lora,
        quantization=quantization,
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
        """Hidden states of each row; output matrix, or a score's ``[1, width]``.

        Of a model with experts, the `Head` says where real tokens were sent.
        """
        hidden, routing, _ = self._whole_rows(batch)
        return hidden, self._head(routing)

    def trace(self, batch: Batch) -> Float[Array, "stages rows length"]:
        """The largest magnitude in each position's hidden state, stage by stage.

        The stages are the embedding, the layers in their order and the last norm. What
        is not finite counts as infinite.
        """
        hidden, _, (first, layers) = self._whole_rows(batch, largest)
        return jnp.concatenate([first[None], layers, largest(hidden)[None]])

    def _whole_rows(
        self, batch: Batch, watch: Watch = unwatched
    ) -> tuple[Hidden, Routing | None, Any]:
        """Hidden states of each row; choices of experts; what `watch` saw."""
        example, branch = jnp.asarray(batch.example), jnp.asarray(batch.branch)
        tokens, position = jnp.asarray(batch.tokens), jnp.asarray(batch.position)

        def attend(
            query: Array, key: Array, value: Array, cache: None, layer: Layer
        ) -> tuple[Array, None]:
            window = layer.window_over(position)
            attended = self.options.attend(
                query, key, value, example, branch, window=window, **self._scores()
            )
            return attended, cache

        longest = None
        if depends_on_length(self.config):
            num_examples = batch.completion_length.shape[1]
            longest = longest_sequences(example, position, num_examples)
        hidden, _, routing, seen = self._blocks(
            tokens, position, attend, None, longest, example > 0, watch
        )
        return hidden, routing, seen

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
            query: Array, key: Array, value: Array, cache: Cache, layer: Layer
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
            attended = attention(
                query,
                keys,
                values,
                example,
                prompt,
                offset,
                window=window,
                **self._scores(),
            )
            return attended, cache

        longest = None
        if depends_on_length(self.config):
            total = jnp.sum(example > 0, axis=1, keepdims=True)
            longest = jnp.broadcast_to(total, position.shape)
        hidden, cache, *_ = self._blocks(tokens, position, attend, cache, longest)
        return hidden, self._head(), cache

    def _scores(self) -> dict[str, float | None]:
        """What is done to the scores of queries and keys."""
        config = self.config
        return {"scale": config.attention_scale, "cap": config.attention_cap}

    def _head(self, routing: Routing | None = None) -> Output:
        config = self.config
        if config.head == "score":
            matrix = self.score.embedding[...]
            return matrix if routing is None else Head(matrix, routing=routing)
        table = self.embedding if config.tied_output else self.output
        matrix = table.embedding[...]
        if not config.head_bias and config.logit_cap is None and routing is None:
            return matrix
        bias = self.output_bias[...] if config.head_bias else None
        return Head(matrix, bias, config.logit_cap, routing)

    def _embed(self, tokens: Array, position: Array) -> Hidden:
        dtype, scale = self.options.compute_dtype, self.config.embedding_scale
        hidden = self.options.look_up(self.embedding.embedding[...], tokens)
        hidden = hidden.astype(dtype)
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
        real: Array | None = None,
        watch: Watch = unwatched,
    ) -> tuple[Hidden, Any, Routing | None, tuple[Any, Any]]:
        """All layers; choices of experts are counted where tokens are `real`."""
        config, dtype = self.config, self.options.compute_dtype
        constrain = self.options.constrain
        hidden = constrain(self._embed(tokens, position))
        first = watch(hidden)
        rotation = make_rotations(config, position, longest)

        def body(carry: tuple, block_and_layer: tuple) -> tuple[tuple, Any]:
            (hidden, cache), (block, layer) = carry, block_and_layer
            hidden = as_residual(hidden)
            rotate, attend_here = rotation(layer), partial(attend, layer=layer)
            hidden, cache, choice = block(hidden, rotate, attend_here, cache)
            carry = constrain(hidden), cache
            seen = watch(hidden)
            if choice is None or real is None:
                return carry, (None, seen)
            return carry, (count_choices(choice, real), seen)

        # Accelerators would otherwise multiply float32 in fewer bits.
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
            layers = self.blocks, stack_layers(config)
            carry, (routing, seen) = jax.lax.scan(
                rematerialize(body, self.options.remat),
                (hidden, cache),
                layers,
            )
        hidden, cache = carry
        routing = jax.tree.map(lambda layers: jnp.sum(layers, axis=0), routing)
        hidden = self.norm(hidden)
        if config.logit_scale != 1 and config.head == "vocabulary":
            # Logits are linear in the hidden states, whose product is elsewhere.
            hidden = hidden * jnp.asarray(config.logit_scale, dtype)
        return hidden, cache, routing, (first, seen)


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
