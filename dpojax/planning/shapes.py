"""A model of which only ``config.json`` is known, as a run would hold it: shapes alone.

Nothing is downloaded, read or allocated but that file. This file knows no programs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jax.sharding import Mesh

from dpojax.command_config import PlanConfig
from dpojax.data.synthetic import make_tokenizer
from dpojax.data.tokenize import Tokenizer, load_tokenizer
from dpojax.loading import Loaded
from dpojax.losses.make import Loss
from dpojax.models.adapter_config import is_adapter
from dpojax.models.decoder import Model, make_model
from dpojax.models.families import as_decoder_config, as_reward_settings
from dpojax.models.huggingface import read_settings
from dpojax.models.lora import (
    Frozen,
    graft,
    make_roles,
    split_adapters,
    start_adapters,
)
from dpojax.models.quantized import make_quantize
from dpojax.offloading import on_host
from dpojax.placing import make_kept_model
from dpojax.policy import Policy, computed, configured_keeping
from dpojax.prepare import make_new_adapters
from dpojax.reference_setting import named_reference
from dpojax.sharding import as_shardings
from dpojax.train_step import all_weights


def find_config(name: str) -> Path:
    """The directory of a model's ``config.json``, on this machine.

    Args:
      name: that directory, the file itself, or a name of the hub whose file is cached.

    Raises:
      ValueError: if it is not here, or is one of adapters.
    """
    path = Path(name)
    directory = path.parent if path.is_file() else path
    if not directory.is_dir():
        directory = _cached(name)
    if is_adapter(directory):
        raise ValueError(
            f"{name} holds adapters; plan with their base as --model, and --lora.rank."
        )
    return directory


def plan_tokenizer(config: PlanConfig) -> Tokenizer:
    """The model's, where data is to be read; else any."""
    if config.model is None or not config.reads_data:
        return make_tokenizer()
    return load_tokenizer(find_config(config.model))


def plan_model(
    config: PlanConfig, settings: dict[str, Any], loss: Loss, mesh: Mesh
) -> Loaded:
    """A model in shapes and shardings, new adapters included.

    Args:
      config: how it is kept and computed; `compute_dtype` and `remat` are given.
      settings: contents of its ``config.json``.
      loss: decides its head.
      mesh: of devices that need not exist.
    """
    if "reward_head" in loss.needs:
        settings = as_reward_settings(settings)
    shape, lora = as_decoder_config(settings), None
    if "reward_head" in loss.needs:
        shape = replace(shape, head="score")
    new_adapters = make_new_adapters(config.lora)
    if new_adapters is not None:
        lora = new_adapters(make_model(shape).params, settings)
        lora = replace(lora, dropout=config.lora.dropout)
    elif config.lora.base is not None or config.lora.dropout:
        raise ValueError(
            "--lora.base and --lora.dropout have no effect without adapters; give "
            "--lora.rank."
        )
    model = make_kept_model(shape, configured_keeping(config, mesh), lora)
    params = _quantized(model, placed(model.params, mesh), mesh)
    if lora is not None:

        def make(base: Any, key: Any) -> Any:
            return start_adapters(base, model.init_adapters(key))

        adapters = jax.eval_shape(make, model.params, jax.random.key(0))
        params = graft(params, placed(adapters, mesh))
    tokenizer = plan_tokenizer(config)
    eos_token = tokenizer.eos_token_id
    assert isinstance(eos_token, int)
    name = config.model or str(config.shape.name)
    loaded = Loaded(model, params, settings, tokenizer, eos_token, name)
    return computed(loaded, config, mesh)


def plan_policy(config: PlanConfig, loss: Loss, loaded: Loaded, mesh: Mesh) -> Policy:
    """What of it is trained and what is frozen, as `dpojax.policy.make_policy` has it.

    Raises:
      ValueError: for a reference that is not planned.
    """
    name, is_precomputed = named_reference(config.reference)
    needed = "reference" in loss.needs and not is_precomputed
    lora, params = loaded.model.lora, loaded.params
    if lora is None:
        reference = params if needed else None
        if "reference" in config.offload and reference is not None:
            where = on_host(jax.tree.map(lambda x: x.sharding, reference), reference)
            reference = jax.tree.map(_abstract, reference, where)
        return Policy(params, reference, all_weights, reference, lambda params: params)
    if name is not None or config.offload == ("reference",):
        raise ValueError(
            "The reference of adapters is planned as their base, which the policy needs"
            " as well; leave out --reference and --offload reference."
        )
    base, trained = jax.eval_shape(split_adapters, params)
    frozen = Frozen(_part(base, params))
    return Policy(
        placed(trained, mesh),
        frozen,
        make_roles(lora, config.seed),
        frozen.reference if needed else None,
        lambda trained: graft(base, trained),
    )


def model_settings(config: PlanConfig) -> dict[str, Any]:
    """The contents of a model's ``config.json``."""
    assert config.model is not None
    return read_settings(find_config(config.model))


def placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings that the rules give them."""
    return jax.tree.map(_abstract, tree, as_shardings(tree, mesh))


def _part(structure: Any, tree: Any) -> Any:
    """The arrays of a tree that another, smaller one has too."""
    return {
        name: _part(below, tree[name]) if isinstance(below, dict) else tree[name]
        for name, below in structure.items()
    }


def _quantized(model: Model, params: Any, mesh: Mesh) -> Any:
    """The base as it is kept; a kernel's parts are divided as the kernel was."""
    if model.quantization is None:
        return params
    convert = make_quantize(model.quantization)

    def kept(path: tuple, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shapes = jax.eval_shape(lambda array: convert(name, array), leaf)
        return jax.tree.map(lambda part: placed({name: part}, mesh)[name], shapes)

    return jax.tree.map_with_path(kept, params)


def _abstract(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _cached(name: str) -> Path:
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise ValueError(
            f"There is no config.json of {name!r} on this machine, and planning "
            "downloads nothing; give the file or its directory as --model."
        )
    return Path(found).parent
