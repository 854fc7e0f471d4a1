"""Memory and FLOPs of a DPO step, compiled for a TPU slice that isn't there.

    pip install libtpu
    python experiments/benchmarks/tpu_step.py --model qwen2.5-0.5b --topology v5e:2x4

compiles the train step that `dpojax train` would run, all weights trained, the
reference in memory or none (precomputed), and prints one JSON line: the compiler's own
account of one chip's memory, and the FLOPs of the program's products of matrices, each
loop by its turns. Rows hold a pair each, its prompt once.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several side by side

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from dpojax.bench_inputs import shape_settings
from dpojax.command_config import ShapeConfig
from dpojax.data.packing import Example, as_batch
from dpojax.losses.make import make_loss
from dpojax.models.decoder import Model, make_model
from dpojax.models.families import as_decoder_config
from dpojax.planning.hlo import parse
from dpojax.planning.shapes import placed
from dpojax.planning.walk import count
from dpojax.sharding import AXES, make_constrain, rows_sharding
from dpojax.spread import Spread
from dpojax.train_step import init_state, make_train_step

SHAPES = "qwen2.5-0.5b", "llama-3.2-1b"


def main() -> None:
    parser = argparse.ArgumentParser(description="A DPO step for a TPU slice.")
    parser.add_argument("--model", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--vocabulary", type=int, help="instead of the model's")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=512)
    parser.add_argument("--reference", choices=["live", "none"], default="live")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and moments")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--save-hlo", type=Path)
    args = parser.parse_args()
    topology = topologies.get_topology_desc(args.topology, platform="tpu")
    devices = np.array(topology.devices).reshape(1, -1, 1, 1)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    compiled = lower(args, mesh).compile()
    text = compiled.as_text()
    if args.save_hlo:
        args.save_hlo.write_text(text)
    # The head's loops end with the last chunk that holds a scored position.
    scored = 2 * args.response * args.pairs / args.microbatches / mesh.size
    counts = count(parse(text), lambda loop: math.ceil(scored / args.chunk_size))
    memory = compiled.memory_analysis()
    figures = {
        "argument_mib": memory.argument_size_in_bytes / 2**20,
        "output_mib": memory.output_size_in_bytes / 2**20,
        "alias_mib": memory.alias_size_in_bytes / 2**20,
        "temp_mib": memory.temp_size_in_bytes / 2**20,
        "tflop": counts.flops / 1e12,
    }
    asked = {name: str(value) for name, value in vars(args).items() if value}
    print(json.dumps(asked | {k: round(v, 3) for k, v in figures.items()}))


def lower(args: argparse.Namespace, mesh: Mesh) -> Any:
    shape = ShapeConfig(name=args.model, vocabulary=args.vocabulary)
    config = as_decoder_config(shape_settings(shape))
    dtype = jnp.dtype(args.dtype)
    model = make_model(
        config,
        compute_dtype=jnp.bfloat16,
        param_dtype=dtype,
        remat=args.remat,
        constrain=make_constrain(mesh),
    )
    loss = make_loss("dpo" if args.reference == "live" else "simpo")
    optimizer = optax.adamw(1e-6)
    state = jax.eval_shape(lambda: init_state(zeros(model), optimizer))
    state = placed(state, mesh)
    reference = state.params if args.reference == "live" else None
    pair = Example(ones(args.prompt), (ones(args.response), ones(args.response)))
    length = -(-(args.prompt - 1 + 2 * args.response) // 128) * 128
    batch = as_batch([[pair]] * args.pairs, length=length)
    rows = rows_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch
    )
    step = make_train_step(
        model.apply,
        loss,
        optimizer,
        num_microbatches=args.microbatches,
        chunk_size=args.chunk_size,
        spread=Spread(mesh),
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
        rows_sharding=rows,
    )
    return step.lower(state, reference, batch)


def zeros(model: Model) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.params)


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.int32)


if __name__ == "__main__":
    sys.exit(main())
