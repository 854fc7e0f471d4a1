"""What a step sends from one slice of TPUs to another, by the compiler's own program.

    python experiments/processes/slices.py [--topology v5e:2x4] [--slices 2]

Compiles a small decoder's DPO step ahead of time; no accelerator is needed, but libtpu
is. It prints, for each kind of exchange between slices, how many arrays and MiB a
device sends, and which devices exchange anything inside a slice. Expected: sums of
gradients and of metrics between slices, and nothing else.
"""

import argparse
import re
from collections import Counter
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh

from dpojax.beginning import state_shapes
from dpojax.data.packing import Example, as_batch
from dpojax.losses.make import make_loss
from dpojax.models.decoder import make_model
from dpojax.models.shape import DecoderConfig
from dpojax.sharding import make_constrain, make_mesh, rows_sharding
from dpojax.spread import Spread
from dpojax.train_step import make_train_step

_BYTES = {"bf16": 2, "f32": 4, "s32": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x4", help="of each slice")
    parser.add_argument("--slices", type=int, default=2)
    settings = parser.parse_args()
    topology = topologies.get_topology_desc(
        settings.topology, platform="tpu", num_slices=settings.slices
    )
    mesh = make_mesh(settings.slices, -1, devices=topology.devices)
    text = str(lower(mesh).compile().as_text())
    arrays, num_bytes = Counter(), Counter()
    for line in text.splitlines():
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
        array = re.search(r"= \((\w+)\[([\d,]*)\]\S* .* send\(", line)
        if kind and array:
            arrays[kind[1]] += 1
            sizes = [int(size) for size in array[2].split(",")]
            num_bytes[kind[1]] += prod(sizes) * _BYTES[array[1]]
    for kind, count in arrays.items():
        print(f"between slices: {kind} of {count} arrays, {num_bytes[kind]:,} bytes")
    groups = r"(?:all|reduce)-\w+(?:-start)?\(.*replica_groups=(\{\{.*?\}\}|\S+?),"
    for devices, count in Counter(re.findall(groups, text)).items():
        print(f"inside a slice: {count} exchanges of {devices}")


def lower(mesh: Mesh) -> jax.stages.Lowered:
    """The step of two layers of Qwen2.5-0.5B's width, a pair on each device."""
    config = DecoderConfig(
        vocabulary_size=4096,
        width=896,
        num_layers=2,
        num_heads=14,
        num_key_heads=2,
        head_dimension=64,
        mlp_width=4864,
        qkv_bias=True,
        tied_output=True,
    )
    model = make_model(
        config, compute_dtype=jnp.bfloat16, remat="full", constrain=make_constrain(mesh)
    )
    loss, optimizer = make_loss("dpo"), optax.adamw(1e-6)
    shapes = state_shapes(model.params, None, optimizer, loss, None, mesh)
    tokens = np.ones(128, np.int32)
    rows = [[Example(tokens, (tokens, tokens))]] * mesh.size
    where = rows_sharding(mesh)
    batch = jax.tree.map(partial(_abstract, sharding=where), as_batch(rows, length=384))
    step = make_train_step(
        model.apply,
        loss,
        optimizer,
        spread=Spread(mesh),
        state_shardings=jax.tree.map(lambda shape: shape.sharding, shapes),
        rows_sharding=where,
    )
    return step.lower(shapes, shapes.params, batch)


def _abstract(
    array: np.ndarray, sharding: jax.sharding.Sharding
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


if __name__ == "__main__":
    main()
