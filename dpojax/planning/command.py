"""The plan command: from settings to figures, and the search for the fastest.

This file joins its rooms; what anything costs is theirs.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from dpojax.bench_inputs import shape_settings
from dpojax.command_config import PlanConfig, ShapeConfig
from dpojax.config import MeshConfig
from dpojax.fit import Way, ways
from dpojax.loading import Loaded
from dpojax.losses.make import Loss
from dpojax.planning.account import account, by_hand, roofline_of, setting_of
from dpojax.planning.analytic import collectives
from dpojax.planning.chips import Slice, read_slice
from dpojax.planning.figures import Figures, show
from dpojax.planning.rows import Rows, first_batch, num_steps, plan_examples
from dpojax.planning.search import Candidate, Sizes, Tried, mesh_shapes, search
from dpojax.planning.shapes import model_settings, plan_model, plan_policy
from dpojax.planning.slices import slice_devices
from dpojax.planning.step import Planned, plan_step
from dpojax.policy import Policy
from dpojax.prepare import check_settings, make_configured_loss
from dpojax.progress import say
from dpojax.sharding import AXES, make_mesh, mesh_sizes


class _Shaped(NamedTuple):
    """A run's model on a mesh, in shapes alone."""

    config: PlanConfig  # how it is computed there
    mesh: Mesh
    loaded: Loaded
    policy: Policy


class _Job(NamedTuple):
    """What stays the same whatever mesh and way are planned."""

    wanted: Slice
    devices: list[Any]  # to compile for; of GPUs one, for shapes alone
    loss: Loss
    settings: dict[str, Any]  # contents of config.json
    rows: Rows | None = None  # known once there is a tokenizer


def plan(config: PlanConfig) -> Figures:
    """Plans a run, and prints what it would need and take.

    Returns:
      What ``--json`` prints: bytes, seconds, FLOPs; what was not computed is not there.

    Raises:
      ValueError: for what cannot be planned, naming what to do.
    """
    config, job = _prepare(config)
    by_name = mesh_sizes(**vars(config.mesh), num_devices=job.wanted.num_chips)
    data, fsdp, expert, context, tensor = (by_name[axis] for axis in AXES)
    sizes = data, fsdp, expert, context, tensor
    loaded = _shape(job, config, sizes).loaded
    job = job._replace(rows=plan_examples(config, job.loss, loaded))
    if config.search:
        figures = _search(job, config)
    else:
        figures = _account(job, _build(job, config, sizes), sizes)
    if config.json:
        print(json.dumps(figures))
    else:
        show(figures)
    return figures


def _prepare(config: PlanConfig) -> tuple[PlanConfig, _Job]:
    if config.topology is None:
        raise ValueError(
            "A plan is of a slice; give --topology, such as v5e:4x8 or h100:8."
        )
    wanted = read_slice(config.topology)
    loss = make_configured_loss(config.loss)
    check_settings(config, loss)
    _check(config)
    for axis in ("expert", "context"):
        if wanted.chip.kind == "gpu" and vars(config.mesh)[axis] != 1:
            raise ValueError(
                f"What devices of --mesh.{axis} exchange is not estimated for "
                f"{wanted.name}; leave it out, or plan for a TPU slice."
            )
        if config.search and vars(config.mesh)[axis] != 1:
            raise ValueError(f"--search does not try --mesh.{axis}; leave it out.")
    # Nothing of a machine that is here is used, so that the plan is the same anywhere.
    jax.config.update("jax_platforms", "cpu")
    # jax cannot load programs for devices that are not there from its cache.
    jax.config.update("jax_enable_compilation_cache", False)
    is_tpu = wanted.chip.kind == "tpu"
    devices = slice_devices(wanted) if is_tpu else jax.devices()[:1]
    settings = model_settings(config) if config.model else shape_settings(config.shape)
    config = replace(
        config,
        compute_dtype=config.compute_dtype or "bfloat16",
        remat=config.remat or "full",
    )
    return config, _Job(wanted, devices, loss, settings)


def _check(config: PlanConfig) -> None:
    """Refuses settings that a plan cannot take."""
    if (config.model is None) == (config.shape == ShapeConfig()):
        raise ValueError("Give a --model with a config.json, or a --shape, not both.")
    if config.fit or config.memory_limit is not None:
        raise ValueError(
            "--fit and --memory-limit are of the machine that trains; to find what "
            "fits, give --search."
        )
    if config.search and config.remat is not None:
        raise ValueError("--search chooses what is recomputed; leave out --remat.")
    if config.num_examples is not None and config.num_examples < 1:
        raise ValueError(
            f"num_examples is {config.num_examples}; a data set has at least one."
        )
    if config.num_examples is not None and config.reads_data:
        raise ValueError("--num-examples is counted in the data; leave it out.")


def _shape(job: _Job, config: PlanConfig, sizes: Sizes) -> _Shaped:
    is_tpu = job.wanted.chip.kind == "tpu"
    on_mesh = dict(zip(AXES, sizes, strict=True)) if is_tpu else {"data": 1}
    mesh = make_mesh(**on_mesh, devices=job.devices)
    if not is_tpu and config.attention == "cudnn":
        config = replace(config, attention="xla")  # there is no GPU to ask
    loaded = plan_model(config, job.settings, job.loss, mesh)
    policy = plan_policy(config, job.loss, loaded, mesh)
    return _Shaped(config, mesh, loaded, policy)


def _build(job: _Job, config: PlanConfig, sizes: Sizes) -> Planned:
    """A step for a mesh; nothing is compiled."""
    assert job.rows is not None
    config = replace(config, mesh=MeshConfig(**dict(zip(AXES, sizes, strict=True))))
    shaped, mesh, loaded, policy = _shape(job, config, sizes)
    batch = first_batch(config, job.loss, job.rows, math.prod(sizes[:3]))
    steps = num_steps(config, job.rows) or 1000
    planned = plan_step(shaped, job.loss, loaded, policy, mesh, batch, steps)
    return planned._replace(config=config)


def _account(job: _Job, planned: Planned, sizes: Sizes) -> Figures:
    assert job.rows is not None
    return account(job.wanted, job.loss, planned, sizes, job.rows)


def _search(job: _Job, config: PlanConfig) -> Figures:
    """Figures of the fastest way that fits, and what else was tried."""
    found: dict[tuple[Sizes, Way], Figures] = {}

    def evaluate(candidate: Candidate) -> float | None:
        decided = _decided(config, candidate.way)
        planned = _build(job, decided, candidate.sizes)
        figures = _account(job, planned, candidate.sizes)
        found[candidate.sizes, candidate.way] = figures
        return figures["roofline"]["seconds"] if figures["fits"] else None

    told: Callable[[str], None] = say if not config.json else lambda line: None
    result = search(_candidates(job, config), evaluate, lambda one: told(_line(one)))
    if result.best is None:
        raise ValueError(
            f"None of {len(result.tried)} ways fits {job.wanted.name}; take more chips,"
            " lower --batch-size or --row-length, keep less by --optimizer.moments or "
            "--offload, or train adapters by --lora.rank."
        )
    told(f"{result.num_left} more ways cannot fit or cannot be faster by 2 %.")
    best = found[result.best.sizes, result.best.way]
    tried = [
        {
            "mesh": dict(zip(AXES, one.candidate.sizes, strict=True)),
            "remat": one.candidate.way.remat,
            "microbatches": one.candidate.way.num_microbatches,
            "seconds": one.seconds,
        }
        for one in result.tried
    ]
    return best | {"search": {"tried": tried, "not_tried": result.num_left}}


def _candidates(job: _Job, config: PlanConfig) -> list[Candidate]:
    """Every mesh whose arguments fit, with every way of computing its step."""
    assert job.rows is not None
    chip, wanted = job.wanted.chip, job.wanted
    candidates = []
    whole = (1, 1 if chip.kind == "gpu" else wanted.num_chips, 1, 1, 1)
    heads = _shape(job, config, whole).loaded.model.config.num_key_heads
    num_rows = len(first_batch(config, job.loss, job.rows, 1).tokens)
    for sizes in mesh_shapes(wanted.num_chips, math.gcd(heads, 8), num_rows):
        most = max(config.microbatches, num_rows // math.prod(sizes[:3]))
        for way in ways(config.microbatches, most):
            if chip.kind == "gpu" and way.remat == "none":
                continue  # not estimated
            planned = _build(job, _decided(config, way), sizes)
            hand = by_hand(planned, job.loss, sizes)
            if hand.arguments > chip.memory:
                break
            bound = hand.flops / chip.flops
            mesh = AbstractMesh(sizes, AXES)
            sent = collectives(planned, setting_of(planned, job.loss), mesh)
            guess = roofline_of(wanted, hand.flops, 0.0, sent)
            candidates.append(Candidate(sizes, way, bound, guess.seconds))
    return candidates


def _decided(config: PlanConfig, way: Way) -> PlanConfig:
    return replace(config, remat=way.remat, microbatches=way.num_microbatches)


def _line(tried: Tried) -> str:
    came = "does not fit" if tried.seconds is None else f"{tried.seconds:.4g} s a step"
    return f"{tried.candidate}: {came}"
