"""What settings name a precomputed reference: its cache, its parameters, its numbers.

The command that fills the cache ahead of a run, and what the run itself does. This file
knows no loop.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpojax.command_config import ReferenceConfig
from dpojax.config import TrainConfig
from dpojax.connecting import connect
from dpojax.data.packing import Example
from dpojax.examples import load_split
from dpojax.loading import Loaded, check_positions, load_reference, weight_files
from dpojax.models.kernels import choose_kernel
from dpojax.models.lora import split_adapters
from dpojax.placing import default_dtype
from dpojax.policy import load_policy
from dpojax.prepare import check_training, make_configured_loss
from dpojax.processes import from_first, is_first
from dpojax.reference import Params
from dpojax.reference_cache import Cache, default_root, find_cache, hash_files
from dpojax.reference_pass import make_reference_step, with_reference
from dpojax.reference_setting import named_reference
from dpojax.sharding import make_mesh, make_placement


class Precomputed(NamedTuple):
    """Splits whose examples bring the reference's log-probabilities along."""

    splits: tuple[list[Example], ...]
    cache: Cache


def reference(config: ReferenceConfig) -> Path:
    """Fills the cache for runs of the same settings; says where it is."""
    name = named_reference(config.reference).model
    spelled = "precomputed" if name is None else f"precomputed:{name}"
    config = replace(config, reference=spelled)
    connect(config.distributed)
    loss = make_configured_loss(config.loss)
    mesh = make_mesh(**vars(config.mesh))
    check_training(config, loss)
    loaded = load_policy(config, loss, mesh)
    check_positions(loaded, config.max_length)
    names = (config.train_split, config.test_split)
    splits = [load_split(config, loss, loaded.tokenizer, name) for name in names]
    return precompute(config, loaded, mesh, splits).cache.directory


def precompute(
    config: TrainConfig, loaded: Loaded, mesh: Mesh, splits: Sequence[Sequence[Example]]
) -> Precomputed:
    """Gives examples the log-probabilities of the reference that settings name.

    Where all are in the cache, the reference is not even loaded. A reference that is
    another model leaves the devices again; the policy's own parameters are used as they
    are, and never copied.

    Args:
      config: its `reference` is a precomputed one.
      loaded: the policy as it is at step 0.
      mesh: over which rows are divided.
      splits: examples.

    Raises:
      ValueError: for a reference that does not fit the policy.
    """
    cache = make_cache(config, loaded)
    together = with_reference(
        [example for split in splits for example in split],
        make_reference_step(loaded.model.apply, mesh, chunk_size=config.chunk_size),
        lambda: _params(config, loaded, mesh),
        cache,
        batch_size=-(-config.batch_size // config.microbatches),
        placement=make_placement(mesh),
    )
    in_order = iter(together)
    parts = tuple([next(in_order) for _ in split] for split in splits)
    return Precomputed(parts, cache)


def make_cache(config: TrainConfig, loaded: Loaded) -> Cache:
    """The cache of the reference that settings name, as it is computed with."""
    root = config.reference_cache
    model = loaded.model
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}
    parts = {
        "weights": _hash_weights(config, loaded),
        "decoder": repr(model.config),
        "compute_dtype": str(jnp.dtype(config.compute_dtype or default_dtype())),
        "kept_as": model.quantization or ", ".join(sorted(dtypes)),
        "backend": jax.default_backend(),
        "attention": choose_kernel(config.attention, model.config.head_dimension),
        "precision": str(jax.config.values["jax_default_matmul_precision"]),
    }
    return find_cache(default_root() if root is None else Path(root), parts)


def _hash_weights(config: TrainConfig, loaded: Loaded) -> str:
    """Of the files that the reference's parameters are in; process 0 reads them."""
    name = named_reference(config.reference).model
    if name is None:
        # New adapters do not change what their base computes.
        name = loaded.base if config.lora.rank is not None else config.model
    assert name is not None
    digest = np.zeros(32, np.uint8)
    if is_first():
        digest = np.frombuffer(hash_files(weight_files(name)), np.uint8)
    return from_first(digest).tobytes().hex()


def _params(config: TrainConfig, loaded: Loaded, mesh: Mesh) -> Params:
    name = named_reference(config.reference).model
    if name is not None:
        return load_reference(name, loaded, mesh)
    if config.lora.rank is not None:
        return split_adapters(loaded.params)[0]
    return loaded.params
