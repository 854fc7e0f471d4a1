"""Parameters on a mesh: a base as it is to be kept, adapters new or of a directory.

This file knows no tokenizer and no training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpojax.context import make_by_context
from dpojax.expert_shards import make_by_shard
from dpojax.kernel_exchange import make_kernel_exchange
from dpojax.models.decoder import DecoderConfig, Model, make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.functional import Params
from dpojax.models.huggingface import read_params, read_settings
from dpojax.models.kernels import KernelChoice, choose_kernel, make_attend
from dpojax.models.linear import kernel_gradient
from dpojax.models.lora import LoraShape, start_adapters
from dpojax.models.peft import read_adapters
from dpojax.models.quantized import make_quantize
from dpojax.models.remat import Remat
from dpojax.sharding import (
    as_shardings,
    make_by_shard_and_head,
    make_constrain,
    make_look_up,
    put_everywhere,
)
from dpojax.torus import make_line

BaseDtype = Literal["float32", "bfloat16", "int8", "nf4"]


class Keeping(NamedTuple):
    """How a model is kept and computed."""

    mesh: Mesh
    compute_dtype: str | None = None  # of activations; None: bfloat16, on CPUs float32
    remat: Remat = "none"  # what the backward pass keeps of each layer
    base_dtype: BaseDtype | None = None  # of a base of adapters; None: as it computes
    dropout: float = 0.0  # of what enters adapters, in training
    attention: KernelChoice = "auto"


def make_kept_model(
    config: DecoderConfig, keeping: Keeping, lora: LoraShape | None
) -> Model:
    """The functions of a model that is kept so.

    Raises:
      ValueError: for experts that would have to be quantised or cannot be divided, or a
        kernel of another kind of machine.
    """
    num_experts = 0 if config.experts is None else config.experts.number
    num_parts = keeping.mesh.shape["expert"]
    if num_parts > 1 and (num_experts == 0 or num_experts % num_parts):
        raise ValueError(
            f"--mesh.expert is {num_parts}, and the model has {num_experts} experts in "
            "a layer; it must divide them."
        )
    num_contexts = keeping.mesh.shape["context"]
    if num_contexts > 1 and num_experts:
        raise ValueError(
            f"--mesh.context is {num_contexts}, and the model has experts, which sort "
            "whole rows; leave it out."
        )
    compute_dtype = jnp.dtype(keeping.compute_dtype or default_dtype())
    base = keeping.base_dtype
    platform = keeping.mesh.devices.flat[0].platform
    if config.experts is not None and base in ("int8", "nf4"):
        raise ValueError(
            f"--lora.base {base} would leave a model's experts as they are, which are "
            "most of it; for models with experts, give float32 or bfloat16."
        )
    param_dtype = jnp.dtype("float32") if lora is None else compute_dtype
    if base in ("float32", "bfloat16"):
        param_dtype = jnp.dtype(base)
    return make_model(
        config,
        compute_dtype=compute_dtype,
        param_dtype=param_dtype,
        remat=keeping.remat,
        constrain=make_constrain(keeping.mesh),
        look_up=make_look_up(keeping.mesh),
        exchange=make_kernel_exchange(
            keeping.mesh, make_line(keeping.mesh, "fsdp"), kernel_gradient
        ),
        by_shard=make_by_shard(keeping.mesh),
        quantization=base if base == "int8" or base == "nf4" else None,
        lora=lora,
        attend=make_attend(
            choose_kernel(
                keeping.attention, config.head_dimension, platform, num_contexts
            ),
            make_by_shard_and_head(keeping.mesh),
            make_by_context(keeping.mesh),
        ),
    )


def default_dtype() -> str:
    """bfloat16 where the hardware multiplies it fast."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def default_remat() -> Remat:
    """On accelerators memory is short; on a CPU products take the time, not sums."""
    return "dots_except_up" if jax.default_backend() == "cpu" else "full"


def read_base(directory: Path, model: Model, mesh: Mesh, seed: int) -> Params:
    """A model's parameters without adapters, its head made where the file has none."""
    shardings = as_shardings(model.params, mesh)
    quantize = make_quantize(model.quantization)
    has_head = as_decoder_config(read_settings(directory)).head == model.config.head
    wanted = {
        name: leaf for name, leaf in model.params.items() if has_head or name != "score"
    }
    where = {name: shardings[name] for name in wanted}
    params = read_params(directory, wanted, where, convert=quantize)
    if has_head:
        return params

    def make_head(key: jax.Array) -> Params:
        return model.init(key)["score"]  # the compiler drops what is not returned

    init = jax.jit(make_head, out_shardings=shardings["score"])
    return params | {"score": init(jax.random.key(seed))}


def donatable(params: Params) -> Params:
    """The same in memory that a step may use again, array by array.

    On a CPU, arrays that were read from files are NumPy's memory, which is not the
    runtime's to reuse: the first step would hold the parameters once more.
    """
    if jax.default_backend() != "cpu":
        return params

    def move(array: jax.Array) -> jax.Array:
        moved = jax.block_until_ready(jnp.copy(array))
        array.delete()
        return moved

    return jax.tree.map(move, params)


def make_adapters(model: Model, base: Params, mesh: Mesh, seed: int) -> Params:
    """New adapters of a model; with them it computes what its base does.

    Args:
      model: its functions.
      base: its parameters without adapters.
      mesh: where the adapters go.
      seed: decides their values.
    """

    def make(key: jax.Array, base: Params) -> Params:
        return start_adapters(base, model.init_adapters(key))

    where = as_shardings(_shapes(model), mesh)
    return jax.jit(make, out_shardings=where)(jax.random.key(seed), base)


def place_adapters(
    directory: Path, model: Model, settings: Mapping[str, Any], mesh: Mesh
) -> Params:
    """The adapters of a directory, which are those that a model has.

    Raises:
      ValueError: for what is missing, damaged, or of another base.
    """
    assert model.lora is not None
    shapes = _shapes(model)
    host = read_adapters(directory, model.lora, shapes, model.params, settings)
    return put_everywhere(host, as_shardings(shapes, mesh))


def _shapes(model: Model) -> Params:
    return jax.eval_shape(model.init_adapters, jax.random.key(0))
