"""What a sweep costs beside single runs, by the TPUs' compiler or by a CPU's clock.

    pip install -e '.[plan]'
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python experiments/sweep/cost.py compile
    python experiments/sweep/cost.py time

`compile` builds, from shapes alone, the step of one LoRA run and that of several for a
TPU slice that is not there, and prints one JSON line for each: FLOPs of products of
matrices, every loop by its turns, and one chip's memory. `time` runs a small shape
here. Both put the steps together as `dpojax train` and `dpojax sweep` do.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from dpojax.batch import Batch
from dpojax.bench_inputs import make_random_model, shape_settings
from dpojax.command_config import BenchConfig, PlanConfig, ShapeConfig
from dpojax.config import LoraConfig, TrainConfig
from dpojax.loading import Loaded
from dpojax.losses.make import make_loss
from dpojax.planning.hlo import parse
from dpojax.planning.rows import first_batch, plan_examples, scored_chunks
from dpojax.planning.shapes import plan_model, plan_policy
from dpojax.planning.walk import count
from dpojax.policy import Policy, computed, make_policy
from dpojax.sharding import make_mesh, make_placement, num_row_shards, rows_sharding
from dpojax.sweep.extent import Extent
from dpojax.sweep.objectives import Objectives
from dpojax.sweep.stacked import Lanes, Place, Stacked, make_stacked
from dpojax.training import Training, make_training

NUM_STEPS = 100
LOSS = make_loss("dpo")
LORA = LoraConfig(rank=16)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a sweep.")
    commands = parser.add_subparsers(dest="command", required=True)
    compiled = commands.add_parser("compile")
    compiled.add_argument("--shape", default="qwen2.5-0.5b")
    compiled.add_argument("--topology", default="v5e:2x2")
    compiled.add_argument("--pairs", type=int, default=4, help="of a step")
    compiled.add_argument("--remat", default="full")
    compiled.add_argument("--runs", type=int, nargs="+", default=[1, 2, 8])
    compiled.add_argument("--seeds", type=int, default=1, help="that runs have")
    timed = commands.add_parser("time")
    timed.add_argument("--shape", default="4x256")
    timed.add_argument("--pairs", type=int, default=4)
    timed.add_argument("--runs", type=int, default=8)
    timed.add_argument("--seeds", type=int, default=1, help="that runs have")
    timed.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    {"compile": compile_all, "time": time_all}[args.command](args)


def compile_all(args: argparse.Namespace) -> None:
    """The single step with a precomputed and a live reference, and the sweep's."""
    devices = topologies.get_topology_desc(args.topology, platform="tpu").devices
    mesh = make_mesh(devices=tuple(devices))
    config = PlanConfig(
        lora=LORA,
        remat=args.remat,
        shape=ShapeConfig(name=args.shape),
        compute_dtype="bfloat16",
        attention="xla",  # the compiler counts no kernel's products
        prompt_tokens=512,
        completion_tokens=256,
        row_length=1024,  # a pair each
        batch_size=args.pairs,
    )
    for reference in ("precomputed", None):
        for runs in args.runs:
            seeds = min(runs, args.seeds)
            extent = Extent(seeds, runs // seeds)
            told = {"runs": runs, "seeds": seeds, "reference": reference or "live"}
            found = _compiled(replace(config, reference=reference), mesh, extent)
            print(json.dumps(told | found))


def _compiled(config: PlanConfig, mesh: Mesh, extent: Extent) -> dict[str, Any]:
    loaded = plan_model(config, shape_settings(config.shape), LOSS, mesh)
    policy = plan_policy(config, LOSS, loaded, mesh)
    training = make_training(config, LOSS, loaded, policy, mesh, NUM_STEPS)
    shards = num_row_shards(mesh)
    host = first_batch(config, LOSS, plan_examples(config, LOSS, loaded), shards)
    if extent.num_runs == 1:
        batch = _shapes(host, rows_sharding(mesh))
        lowered = training.step.lower(training.shapes, training.frozen, batch)
    else:
        stacked = _stacked(config, loaded, policy, mesh, training, extent)
        batches = _shapes(_repeated(host, extent), stacked.rows)
        states, lanes = stacked.shapes, _lanes(extent)
        lowered = stacked.step.lower(states, lanes, policy.frozen, batches)
    program = lowered.compile()
    positions = host.tokens.size // shards
    turns = scored_chunks(host, shards, 1, min(config.chunk_size, positions))
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None and memory is not None
    counts = count(parse(text), lambda loop: turns)
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    gib = {f"{name}_gib": round(size / 2**30, 3) for name, size in sizes.items()}
    return (
        {"tflop": round(counts.flops / 1e12, 4)}
        | gib
        | {"shape": str(host.tokens.shape)}
    )


def time_all(args: argparse.Namespace) -> None:
    """CPU seconds of a step of all runs at once, and of one run's."""
    mesh = make_mesh()
    config = replace(
        PlanConfig(lora=LORA),
        shape=ShapeConfig(name=args.shape),
        prompt_tokens=64,
        completion_tokens=64,
        batch_size=args.pairs,
    )
    bench = BenchConfig(lora=LORA, shape=config.shape)
    loaded = computed(make_random_model(bench, mesh), config, mesh)
    found = {}
    for reference in ("precomputed", None):
        told = replace(config, reference=reference)
        extent = Extent(args.seeds, args.runs // args.seeds)
        one, every = _times(told, loaded, mesh, extent, args.steps)
        name = reference or "live"
        found |= {f"one run, {name}": one, f"{args.runs} runs, {name}": every}
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


def _times(
    config: PlanConfig, loaded: Loaded, mesh: Mesh, extent: Extent, steps: int
) -> tuple[float, float]:
    host = first_batch(
        config, LOSS, plan_examples(config, LOSS, loaded), num_row_shards(mesh)
    )
    batch = make_placement(mesh).put(host)
    policy = make_policy(config, LOSS, loaded, mesh)
    training = make_training(config, LOSS, loaded, policy, mesh, NUM_STEPS)
    stacked, lanes = (
        _stacked(config, loaded, policy, mesh, training, extent),
        _lanes(extent),
    )
    batches = jax.device_put(_repeated(host, extent), stacked.rows)
    states = stacked.empty()
    for place in np.ndindex(*extent):
        states = stacked.put(states, Place(*place), training.begin())
    state = jax.tree.map(jnp.copy, training.begin())  # the step takes it

    def one(state: Any) -> Any:
        return training.step(state, policy.frozen, batch)

    def every(states: Any) -> Any:
        return stacked.step(states, lanes, policy.frozen, batches)

    return _seconds(one, state, steps), _seconds(every, states, steps)


def _seconds(step: Callable[[Any], Any], state: Any, steps: int) -> float:
    """The median of the process's CPU seconds, compilation left out."""
    times = []
    for _ in range(steps + 1):
        start = time.process_time()
        state, sums = step(state)
        jax.block_until_ready(sums)
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def _stacked(
    config: TrainConfig,
    loaded: Loaded,
    policy: Policy,
    mesh: Mesh,
    training: Training,
    extent: Extent,
) -> Stacked:
    return make_stacked(
        config,
        Objectives([LOSS]),
        loaded,
        policy,
        mesh,
        num_steps=NUM_STEPS,
        movement=None,
        shapes=training.shapes,
        extent=extent,
    )


def _lanes(extent: Extent) -> Lanes:
    return Lanes(jnp.zeros(extent, jnp.int32), jnp.full(extent, 1e-5))


def _repeated(batch: Batch, extent: Extent) -> Batch:
    """The same for every seed."""
    return jax.tree.map(lambda x: np.stack([x] * extent.seeds), batch)


def _shapes(batch: Batch, sharding: NamedSharding) -> Batch:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch
    )


if __name__ == "__main__":
    main()
