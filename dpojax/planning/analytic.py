"""A step counted by hand: its FLOPs with what is recomputed, and a GPU's memory.

`dpojax.flops` counts what a result needs; this adds what settings have computed twice
and on padding, which makes it comparable with a compiled program's count. For GPUs,
which have no compiler here, memory and traffic are estimated too, from the arrays that
a step must hold and move: these are no promises.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh

from dpojax.batch import Batch
from dpojax.flops import forward_flops, matrix_size, num_positions, step_flops
from dpojax.models.kernels import Kernel
from dpojax.models.remat import Remat
from dpojax.models.shape import DecoderConfig
from dpojax.planning.step import Planned, chip_bytes
from dpojax.sharding import as_shardings, num_row_shards
from dpojax.vocabulary.tiles import TILE

# Products of the backward pass of attention, beside the four that its result needs.
_MORE_PRODUCTS: dict[Kernel, int] = {"xla": 1, "flash": 3, "cudnn": 1}
_PROJECTS_AGAIN: tuple[Remat, ...] = ("full", "offload", "save_attention")
_HALF = 2  # bytes of a number in bfloat16


class Setting(NamedTuple):
    """What decides what is computed twice."""

    remat: Remat
    kernel: Kernel
    has_reference: bool  # in the step
    adapter_size: int | None  # numbers in adapters; None: all weights are trained
    repeats_forward: bool  # microbatches of a loss that looks at whole batches
    trunk: int = 0  # layers below all adapters, which pass once, forward


def model_flops(config: DecoderConfig, batch: Batch, setting: Setting) -> float:
    """What the result of a step needs, on all chips."""
    return step_flops(
        config,
        batch,
        has_reference=setting.has_reference,
        adapter_size=setting.adapter_size,
        trunk=setting.trunk,
    )


def computed_flops(config: DecoderConfig, batch: Batch, setting: Setting) -> float:
    """What a step computes, on all chips: also twice, and on padding.

    A rematerialised layer is computed again but for its last product, whose result
    nothing needs; a trained head's logits are, and attention's scores in its backward
    pass: XLA's once, by the flash kernels of queries and of keys each.
    """
    needed = model_flops(config, batch, setting)
    again = _again(config, batch, setting)
    if setting.adapter_size is not None:
        again += 2.0 * setting.adapter_size * num_positions(batch)
    passes = 2 if setting.adapter_size is not None else 3
    passes += int(setting.has_reference) + _projected_again(config, setting.remat)
    passes = _passes(config, setting, passes) / config.num_layers
    passes += int(setting.repeats_forward)
    padding = np.size(batch.tokens) / num_positions(batch) - 1
    projections = forward_flops(config, batch).projections
    return needed + again + padding * passes * projections


def _again(config: DecoderConfig, batch: Batch, setting: Setting) -> float:
    forward = forward_flops(config, batch, setting.trunk)
    total = _MORE_PRODUCTS[setting.kernel] / 2 * forward.attention
    if setting.adapter_size is None:
        total += forward.head
    total += _projected_again(config, setting.remat) * forward.projections
    if setting.remat in ("full", "offload"):
        total += forward.attention
    if setting.repeats_forward:
        total += sum(forward_flops(config, batch))
    return total


def _passes(config: DecoderConfig, setting: Setting, each: float) -> float:
    """Passes of single layers, of which those of the trunk have one."""
    return setting.trunk + (config.num_layers - setting.trunk) * each


def _projected_again(config: DecoderConfig, remat: Remat) -> float:
    """The share of a layer's projections that is computed again: all but the last."""
    if remat not in _PROJECTS_AGAIN:
        return 0.0
    inside = config.mlp_width
    if config.experts is not None:
        inside = config.experts.width * config.experts.per_token
    return 1 - config.width * inside / matrix_size(config)


class Estimate(NamedTuple):
    """Of one GPU, by hand."""

    arguments: float  # bytes; these are exact
    temporaries: float
    memory_bytes: float  # traffic
    sent_bytes: dict[str, float]


def estimate(planned: Planned, setting: Setting, mesh: AbstractMesh) -> Estimate:
    """A step's memory and traffic, from the arrays that it must hold and move.

    Arguments are exact. Temporaries are the gradients, what layers keep for the
    backward pass, twice a layer's gathered matrices, a layer's activations in the
    works, and a chunk's logits of one tile. Traffic: the state is read and written
    once, gathered matrices and activations once a pass.

    Args:
      planned: the step, for whatever device.
      setting: what is computed twice.
      mesh: the GPUs.

    Raises:
      ValueError: where all of a layer is kept, of which nothing is known here.
    """
    config = planned.loaded.model.config
    if setting.remat == "none":
        raise ValueError(
            "What --remat none keeps is up to XLA's compiler for GPUs, so that it is "
            "not estimated; give dots, dots_except_up, save_attention or full."
        )
    shards, tensor = num_row_shards(mesh), mesh.shape["tensor"]
    state, frozen, _ = planned.arguments
    held = [_chip_bytes(state, mesh), _chip_bytes(frozen, mesh)]
    grads = _chip_bytes(planned.policy.trained, mesh)
    positions = np.size(planned.batch.tokens) / shards / planned.config.microbatches
    layer = _HALF * matrix_size(config) / tensor
    num_kept = config.num_layers - setting.trunk
    kept = positions * num_kept * _kept(config, setting.remat) * _HALF
    working = positions * _kept(config, "dots") * 2 * _HALF / tensor
    logits = 2 * 4 * planned.config.chunk_size * TILE
    passes = _passes(config, setting, 2 + int(setting.has_reference))
    moved = passes * (layer + working)
    return Estimate(
        argument_bytes(planned, mesh),
        grads + kept + 2 * layer + working + logits,
        2 * held[0] + held[1] + 2 * grads + planned.config.microbatches * moved,
        collectives(planned, setting, mesh),
    )


def argument_bytes(planned: Planned, mesh: AbstractMesh) -> float:
    """What a chip of a mesh is given: exact, whatever device the step is for."""
    state, frozen, batch = planned.arguments
    rows = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    shared = _chip_bytes(state, mesh) + _chip_bytes(frozen, mesh)
    return shared + rows / num_row_shards(mesh)


def _chip_bytes(tree: Any, mesh: AbstractMesh) -> float:
    leaves, places = jax.tree.leaves(tree), jax.tree.leaves(as_shardings(tree, mesh))
    return sum(
        chip_bytes(leaf, where) for leaf, where in zip(leaves, places, strict=True)
    )


def _kept(config: DecoderConfig, remat: Remat) -> int:
    """Numbers of a position that a layer keeps."""
    queries = config.num_heads * config.head_dimension
    keys = config.num_key_heads * config.head_dimension
    products = 3 * config.width + 2 * queries + 2 * keys + config.mlp_width
    return {
        "offload": 0,
        "full": config.width,
        "save_attention": config.width + queries,
        "dots_except_up": products,
        "dots": products + config.mlp_width,
    }[remat]


def collectives(
    planned: Planned, setting: Setting, mesh: AbstractMesh
) -> dict[str, float]:
    """Bytes that a GPU sends in a step; what experts exchange is not among them."""
    config, sizes = planned.loaded.model.config, mesh.shape
    parts = planned.config.microbatches
    data, fsdp, tensor = (_share(sizes[axis]) for axis in ("data", "fsdp", "tensor"))
    layer = _HALF * matrix_size(config) / sizes["tensor"]
    grads = _chip_bytes(planned.policy.trained, mesh)
    shards = num_row_shards(mesh) * parts
    positions = np.size(planned.batch.tokens) / shards
    reference = int(setting.has_reference)
    found = {}
    if fsdp:
        passes = _passes(config, setting, 2 + reference)
        found["all-gather"] = parts * passes * fsdp * layer
        found["reduce-scatter"] = parts * fsdp * grads * sizes["fsdp"]
    if data:
        found["all-reduce"] = 2 * data * grads
    if tensor:
        again = 1 if setting.remat in _PROJECTS_AGAIN else 0
        times = 2 * _passes(config, setting, 2 + again + reference) * parts
        hidden = positions * config.width * _HALF
        reduced = times * 2 * tensor * hidden
        found["all-reduce"] = found.get("all-reduce", 0.0) + reduced
    return found


def _share(size: int) -> float:
    return (size - 1) / size
