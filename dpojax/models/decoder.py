"""One decoder-only transformer, its variants by config, as pure functions.

Parameters come with adapters or without, with or without the keys of dropout, plain or
quantised: each is a module of its own, and the tree that a function is given decides
which one computes. This file knows no loss, no optimiser and no mesh.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dpojax.batch import Batch
from dpojax.expert_shards import ByShard, alone
from dpojax.kernel_exchange import KernelExchange
from dpojax.log_probs import Output
from dpojax.models.blockwise import blockwise_attention
from dpojax.models.depth import Begun
from dpojax.models.functional import Params, as_function, by_structure
from dpojax.models.linear import ALONE, Attend, LookUp, Options, take
from dpojax.models.lora import LoraShape, split_adapters
from dpojax.models.quantized import Quantization
from dpojax.models.remat import Remat
from dpojax.models.shape import DecoderConfig
from dpojax.models.transformer import Cache, Decoder


class Model(NamedTuple):
    """A decoder as pure functions of its parameters."""

    config: DecoderConfig
    params: Params  # shapes and dtypes, no arrays
    init: Callable[[Array], Params]  # key -> parameters
    init_adapters: Callable[[Array], Params]  # key -> adapters, as `lora` has them
    # (params, batch) -> hidden states [rows, length, width], and what they meet; third
    # it takes what `begin` gives, which it computes otherwise
    apply: Callable[..., tuple[Array, Output]]
    # (params, batch) -> what does not depend on adapters; None: everything does
    begin: Callable[[Params, Batch], Begun | None]
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
        trunk=0 if lora is None else lora.trunk(config.num_layers),
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

    def joined(method: Callable[..., Any]) -> Callable[..., Any]:
        return by_structure([as_function(module, method) for module in modules])

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
        apply=joined(Decoder.__call__),
        begin=joined(Decoder.begin),
        trace=joined(Decoder.trace),
        extend=joined(Decoder.extend),
        empty_cache=empty_cache,
        lora=lora,
        quantization=quantization,
    )
