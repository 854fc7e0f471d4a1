"""Adapters on a mesh: new ones, or those of a directory. Knows no training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dpojax.models.decoder import Model
from dpojax.models.functional import Params
from dpojax.models.lora import start_adapters
from dpojax.models.peft import read_adapters
from dpojax.sharding import as_shardings


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
    return jax.device_put(host, as_shardings(shapes, mesh))


def _shapes(model: Model) -> Params:
    return jax.eval_shape(model.init_adapters, jax.random.key(0))
