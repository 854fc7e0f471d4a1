"""What of a model is trained and what stays frozen, and how both make the policy.

All weights are trained, and the reference is another model in memory; or adapters are,
and the reference is their base, which exists once. This file knows no loop.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dpojax.config import TrainConfig
from dpojax.loading import Loaded, load_model, load_reference, load_reward_model
from dpojax.losses.make import Loss
from dpojax.models.decoder import Model
from dpojax.models.huggingface import write_model
from dpojax.models.lora import Frozen, graft, make_roles, split_adapters
from dpojax.models.peft import write_adapters
from dpojax.offloading import fetch_parameters, put_on_host
from dpojax.placing import (
    Keeping,
    default_remat,
    donatable,
    make_adapters,
    make_kept_model,
)
from dpojax.prepare import make_new_adapters
from dpojax.reference import Params, copy_params
from dpojax.reference_setting import named_reference
from dpojax.train_step import Roles, all_weights


class Policy(NamedTuple):
    """A model as a run trains it."""

    trained: Params  # what the first step is given
    frozen: Any  # the step's second argument
    roles: Roles  # both, to the parameters of policy and reference
    reference: Params | None
    whole: Callable[[Params], Params]  # what is trained, to the policy's parameters
    evaluated: Roles = all_weights  # as `roles`, without dropout


def load_policy(config: TrainConfig, loss: Loss, mesh: Mesh) -> Loaded:
    """Loads what a run starts from.

    Raises:
      ValueError: for a model, adapters or settings of these that cannot be used.
    """
    assert config.model is not None
    load = load_reward_model if "reward_head" in loss.needs else load_model
    adapters = make_new_adapters(config.lora)
    keeping = configured_keeping(config, mesh)
    loaded = load(config.model, keeping, new_adapters=adapters, seed=config.seed)
    if loaded.model.lora is None:
        loaded = loaded._replace(params=donatable(loaded.params))
    return _fetching(loaded, config)


def configured_keeping(config: TrainConfig, mesh: Mesh) -> Keeping:
    """How settings keep and compute a model."""
    return Keeping(
        mesh,
        config.compute_dtype,
        config.remat or default_remat(),
        config.lora.base,
        config.lora.dropout,
        config.attention,
    )


def computed(loaded: Loaded, config: TrainConfig, mesh: Mesh) -> Loaded:
    """The same parameters with functions that keep and fetch what settings say."""
    keeping = configured_keeping(config, mesh)
    model = make_kept_model(loaded.model.config, keeping, loaded.model.lora)
    return _fetching(loaded._replace(model=model), config)


def make_policy(config: TrainConfig, loss: Loss, loaded: Loaded, mesh: Mesh) -> Policy:
    """Divides a model into what is trained and what is frozen, its reference included.

    Raises:
      ValueError: for a reference that does not fit the policy.
    """
    name, is_precomputed = named_reference(config.reference)
    needed = "reference" in loss.needs and not is_precomputed
    reference = None
    if needed and name is not None:
        reference = load_reference(name, loaded, mesh)
    lora = loaded.model.lora
    if lora is None:
        if needed and reference is None:
            reference = copy_params(loaded.params)  # the step takes the policy's own
        if "reference" in config.offload:
            reference = put_on_host(reference)
        return Policy(
            loaded.params, reference, all_weights, reference, lambda params: params
        )
    if "reference" in config.offload:
        raise ValueError(
            "The reference of adapters is their base, which the policy needs as well; "
            "leave out --offload reference."
        )
    if config.moving.kind != "none":
        raise ValueError(
            "A moving reference needs all weights to be trained: a mixture of adapters "
            "is not that of the models; leave out --moving or --lora.rank."
        )
    base, trained = split_adapters(loaded.params)
    adapters = None  # the reference's; without any it is the base
    if reference is not None:
        adapters = _adapters_of(reference, base, config, loaded.base)
    elif needed and config.lora.rank is None:
        adapters = copy_params(trained)
    frozen = Frozen(base, adapters)
    return Policy(
        trained,
        frozen,
        make_roles(lora, config.seed),
        frozen.reference if needed else None,
        partial(graft, base),
        make_roles(replace(lora, dropout=0.0)),
    )


def of_seed(
    policy: Policy, loaded: Loaded, config: TrainConfig, mesh: Mesh, seed: int
) -> Policy:
    """The same policy as another seed begins it: only new adapters are drawn."""
    if config.lora.rank is None:
        return policy
    base, _ = split_adapters(loaded.params)
    adapters = make_adapters(loaded.model, base, mesh, seed)
    return policy._replace(trained=split_adapters(graft(base, adapters))[1])


def default_learning_rate(loss: Loss, loaded: Loaded) -> float:
    """The objective's; ten times it for adapters, as TRL's documentation advises."""
    return loss.learning_rate * (1 if loaded.model.lora is None else 10)


def write_trained(
    directory: Path,
    trained: Params,
    model: Model,
    settings: dict[str, Any],
    base_name: str,
    write_rest: Callable[[Path], object],
    *,
    generation_settings: dict[str, Any] | None,
) -> None:
    """Writes a model's directory or, where adapters were trained, one of these.

    Args:
      directory: where; replaced if it exists.
      trained: nested dicts of arrays.
      model: whose they are.
      settings: contents of ``config.json``.
      base_name: by which adapters find their base.
      write_rest: writes the tokenizer and what else there is into a given directory.
      generation_settings: contents of a model's ``generation_config.json``, if any.
    """
    if model.lora is None:
        write_model(
            directory,
            trained,
            settings,
            write_rest,
            generation_settings=generation_settings,
        )
    else:
        shape, base = model.lora, model.params
        write_adapters(directory, trained, shape, base, settings, base_name, write_rest)


def _fetching(loaded: Loaded, config: TrainConfig) -> Loaded:
    """A model that can have its parameters from the host, where settings leave them."""
    if "reference" not in config.offload:
        return loaded
    model = loaded.model
    apply, trace = (fetch_parameters(each) for each in (model.apply, model.trace))
    return loaded._replace(model=model._replace(apply=apply, trace=trace))


def _adapters_of(
    reference: Params, base: Params, config: TrainConfig, base_name: str
) -> Params | None:
    own_base, adapters = split_adapters(reference)
    if own_base["embedding"]["embedding"] is not base["embedding"]["embedding"]:
        raise ValueError(
            f"The reference of adapters is their base {base_name}, or adapters of it; "
            f"{config.reference} is another model."
        )
    return adapters or None
