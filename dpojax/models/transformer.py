"""The module: tokens to final hidden states, through all layers.

Layers are stacked and scanned, so that a program's size and compile time do not grow
with depth; where layers differ, in window or rotary embedding, arrays are scanned
beside them that say how. The module knows the row layout, but no loss, no optimiser and
no mesh: where activations are to be pinned, the caller passes a function for it.
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
from dpojax.models.attention import attention
from dpojax.models.block import Block, Hidden, make_norm
from dpojax.models.depth import (
    Begun,
    Depth,
    begin_layers,
    end_layers,
    leave_out_adapters,
    scan_layers,
)
from dpojax.models.layers import (
    Layer,
    depends_on_length,
    longest_sequences,
    make_rotations,
    stack_layers,
)
from dpojax.models.linear import Options
from dpojax.models.remat import Body, as_residual
from dpojax.models.shape import DecoderConfig
from dpojax.models.watch import Watch, largest, unwatched
from dpojax.routing import Routing, count_choices


class Cache(NamedTuple):
    """Keys and values of the tokens so far, all layers."""

    key: Float[Array, "layers rows keys key_heads dimension"]
    value: Float[Array, "layers rows keys key_heads dimension"]


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
        blocks = make_block(rngs.split(config.num_layers))
        self.blocks = leave_out_adapters(blocks, options.trunk)
        self.norm = make_norm(config, options, rngs, config.width)

    def __call__(
        self, batch: Batch, begun: Begun | None = None
    ) -> tuple[Hidden, Output]:
        """Hidden states of each row; output matrix, or a score's ``[1, width]``.

        Of a model with experts, the `Head` says where real tokens were sent. What
        `begin` gives of the batch is not computed again.
        """
        body = self._body_of_rows(batch)
        if begun is None:
            passed = self._pass(scan_layers, body, (self._enter_rows(batch), None))
        else:
            passed = self._pass(end_layers, body, begun)
        (hidden, _), (routing, _) = passed
        routing = jax.tree.map(lambda layers: jnp.sum(layers, axis=0), routing)
        return self._leave(hidden), self._head(routing)

    def begin(self, batch: Batch) -> Begun | None:
        """What of a call does not depend on adapters: the layers below the first."""
        if self.options.trunk == 0:
            return None
        start = (self._enter_rows(batch), None)
        return self._pass(begin_layers, self._body_of_rows(batch), start)

    def trace(self, batch: Batch) -> Float[Array, "stages rows length"]:
        """The largest magnitude in each position's hidden state, stage by stage.

        The stages are the embedding, the layers in their order and the last norm. What
        is not finite counts as infinite.
        """
        first, body = self._enter_rows(batch), self._body_of_rows(batch, largest)
        (hidden, _), (_, layers) = self._pass(scan_layers, body, (first, None))
        ends = largest(first)[None], largest(self._leave(hidden))[None]
        return jnp.concatenate([ends[0], layers, ends[1]])

    def _enter_rows(self, batch: Batch) -> Hidden:
        return self._enter(jnp.asarray(batch.tokens), jnp.asarray(batch.position))

    def _body_of_rows(self, batch: Batch, watch: Watch = unwatched) -> Body:
        """A layer of whole rows; it keeps its choices of experts, and what is seen."""
        example, branch = jnp.asarray(batch.example), jnp.asarray(batch.branch)
        position = jnp.asarray(batch.position)

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
        return self._body(position, attend, longest, example > 0, watch)

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
        body = self._body(position, attend, longest)
        start = (self._enter(tokens, position), cache)
        (hidden, cache), _ = self._pass(scan_layers, body, start)
        return self._leave(hidden), self._head(), cache

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

    def _enter(self, tokens: Array, position: Array) -> Hidden:
        """Hidden states before the first layer."""
        dtype, scale = self.options.compute_dtype, self.config.embedding_scale
        hidden = self.options.look_up(self.embedding.embedding[...], tokens)
        hidden = hidden.astype(dtype)
        if scale != 1:
            hidden = hidden * jnp.asarray(scale, dtype)
        if self.config.positions == "learned":
            hidden += self.position.embedding[...][position].astype(dtype)
        return self.options.constrain(hidden)

    def _leave(self, hidden: Hidden) -> Hidden:
        """Final hidden states from those behind the last layer."""
        config, dtype = self.config, self.options.compute_dtype
        hidden = self.norm(hidden)
        if config.logit_scale != 1 and config.head == "vocabulary":
            # Logits are linear in the hidden states, whose product is elsewhere.
            hidden = hidden * jnp.asarray(config.logit_scale, dtype)
        return hidden

    def _body(
        self,
        position: Array,
        attend: Callable,
        longest: Array | None,
        real: Array | None = None,
        watch: Watch = unwatched,
    ) -> Body:
        """A layer; choices of experts are counted where tokens are `real`."""
        constrain = self.options.constrain
        rotation = make_rotations(self.config, position, longest)

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

        return body

    def _pass(self, scan: Callable[..., Any], body: Body, start: Any) -> Any:
        """Layers by one of the functions of `dpojax.models.depth`."""
        config, options = self.config, self.options
        is_exact = options.compute_dtype == jnp.float32
        make_plain = partial(Block, config, options._replace(lora=None))
        depth = Depth(options.remat, options.trunk, make_plain)
        # Accelerators would otherwise multiply float32 in fewer bits.
        with jax.default_matmul_precision("highest" if is_exact else None):
            return scan(body, start, self.blocks, stack_layers(config), depth)


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
