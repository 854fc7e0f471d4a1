"""The bench command: what a train step takes, measured in training's own pipeline.

Settings, data, rows, placement and step are those of train; only evaluation, files and
the progress bar are left out.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpojax.bench_inputs import make_pairs, make_random_model, read_pairs
from dpojax.command_config import BenchConfig
from dpojax.connecting import connect
from dpojax.data.loader import training_batches
from dpojax.data.packing import Example
from dpojax.examples import load_split
from dpojax.flops import num_positions, num_sequence_tokens, step_flops
from dpojax.loading import Loaded, as_reward_examples, check_positions
from dpojax.losses.make import Loss
from dpojax.measured_steps import (
    Step,
    Taken,
    measure_ceiling,
    take_steps,
)
from dpojax.memory_peaks import device_peak, host_peak
from dpojax.placing import default_dtype
from dpojax.policy import Policy, computed, load_policy, make_policy
from dpojax.precompute import precompute
from dpojax.prepare import check_settings, make_configured_loss
from dpojax.progress import say, show_table
from dpojax.reference_setting import named_reference
from dpojax.run_log import num_parameters
from dpojax.sharding import make_mesh, make_placement, num_row_shards
from dpojax.training import make_training
from dpojax.whole_files import new_file, write_json_lines

Figures = dict[str, Any]

_OF_RUNS = (
    "resume", "checkpoints", "epochs", "stop_after", "log_every", "evaluate_every",
    "save_every", "keep_last", "sample_prompts", "sample_tokens", "test_split", "fit",
    "memory_limit", "track",
)  # fmt: skip
_OF_DATA = (
    "data_weights", "columns", "pairs_from", "rejection_beta", "turns", "train_split",
    "test_size", "max_examples", "max_length", "too_long",
)  # fmt: skip
_OF_RANDOM_PAIRS = ("prompt_tokens", "completion_tokens", "spread")


def bench(config: BenchConfig) -> Figures:
    """Measures train steps, and prints and writes what they took.

    Returns:
      What the JSON file holds: times in seconds, memory in bytes.
    """
    # -- Settings that cannot work ----------------------------------------------------
    connect(config.distributed)
    loss = make_configured_loss(config.loss)
    mesh = make_mesh(**vars(config.mesh))
    check_settings(config, loss)
    _check(config, loss)
    output = None if config.output is None else new_file(config.output)

    # -- Model, data and step ---------------------------------------------------------
    if config.model is None:
        loaded = computed(make_random_model(config, mesh), config, mesh)
    else:
        loaded = load_policy(config, loss, mesh)
    examples = _examples(config, loss, loaded)
    policy = make_policy(config, loss, loaded, mesh)
    if named_reference(config.reference).is_precomputed:
        (examples,), _ = precompute(config, loaded, mesh, (examples,))
    num_steps = config.unmeasured_steps + (config.steps or 0)
    training = make_training(config, loss, loaded, policy, mesh, num_steps)
    state = training.begin()
    counts = num_parameters(state.params), num_parameters(loaded.params)

    # -- Steps ------------------------------------------------------------------------
    batches = training_batches(
        examples,
        batch_size=config.batch_size,
        num_seen=num_steps * config.batch_size,
        seed=config.seed,
        start=0,
        stop=num_steps,
        row_multiple=config.microbatches * num_row_shards(mesh),
        row_length=config.row_length,
        mismatch_within=config.max_length if "mismatched" in loss.needs else None,
    )
    taken = take_steps(
        training,
        state,
        batches,
        make_placement(mesh),
        num_unmeasured=config.unmeasured_steps,
        trace=config.trace,
    )

    # -- Figures ----------------------------------------------------------------------
    dtype = config.compute_dtype or default_dtype()
    figures = _about(config, mesh, dtype, counts)
    figures |= _memory(taken)  # before the ceiling takes some
    measured = _measured(taken, config.unmeasured_steps)
    figures |= _times(taken, measured)
    figures |= _rates(measured, _flops(measured, loss, loaded, policy))
    figures["ceiling_flops_per_second"] = measure_ceiling(dtype)
    figures["flops_utilization"] = (
        figures["flops_per_second"] / figures["ceiling_flops_per_second"]
    )
    _show(figures)
    if output is not None:
        write_json_lines(output, [figures])
        say(f"{output}: the same, and each step's")
    return figures


def _check(config: BenchConfig, loss: Loss) -> None:
    """Refuses settings that a benchmark of these inputs does not look at."""
    if config.unmeasured_steps < 0 or config.steps is None:
        raise ValueError(
            f"A benchmark takes {config.steps} steps after {config.unmeasured_steps}; "
            "give numbers, the first positive and the second not negative."
        )
    if config.model is not None and config.shape != type(config.shape)():
        raise ValueError("Give a --model or a --shape, not both.")
    if config.data and (config.model is None or config.token_file is not None):
        raise ValueError(
            "Data as text goes with a --model, whose tokenizer reads it, and without a "
            "--token-file."
        )
    if config.model is None and config.reference is not None:
        raise ValueError("The reference of a random model is itself; give --model.")
    _refuse(config, _OF_RUNS, "has no effect on a benchmark")
    if config.data:
        _refuse(config, _OF_RANDOM_PAIRS, "has no effect on given data")
        return
    _refuse(config, _OF_DATA, "has no effect without --data")
    if config.token_file is not None:
        _refuse(config, _OF_RANDOM_PAIRS, "has no effect on a --token-file")
    if loss.kind != "pair" or "score" in loss.needs or "mismatched" in loss.needs:
        raise ValueError(
            f"The loss {loss.name!r} needs more than pairs of tokens; give --data."
        )


def _refuse(config: BenchConfig, names: tuple[str, ...], why: str) -> None:
    for setting in fields(config):
        if setting.name in names and vars(config)[setting.name] != _default(setting):
            flag = setting.name.replace("_", "-")
            raise ValueError(f"--{flag} {why}; leave it out.")


def _default(setting: Any) -> Any:
    factory = setting.default_factory
    return factory() if callable(factory) else setting.default


def _examples(config: BenchConfig, loss: Loss, loaded: Loaded) -> Sequence[Example]:
    vocabulary = loaded.model.config.vocabulary_size
    if config.data:
        check_positions(loaded, config.max_length)
        examples = load_split(config, loss, loaded.tokenizer, config.train_split)
    elif config.token_file is not None:
        examples = read_pairs(Path(config.token_file), vocabulary)
    else:
        examples = make_pairs(config, vocabulary)
    if "reward_head" in loss.needs:
        examples = as_reward_examples(examples, loaded)
    return examples


def _about(
    config: BenchConfig, mesh: Mesh, dtype: str, counts: tuple[int, int]
) -> Figures:
    trained, every = counts
    return {
        "library": "dpojax",
        "model": config.model or config.shape.name,
        "loss": config.loss.name,
        "parameters": every,
        "trained_parameters": trained,
        "batch_size": config.batch_size,
        "compute_dtype": dtype,
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def _memory(taken: Taken) -> Figures:
    """Peaks of host and device, and what the compiler says of the largest program."""
    analyses = [program.run.memory_analysis() for program in taken.programs]
    largest = max(
        (one for one in analyses if one is not None),
        key=lambda one: one.temp_size_in_bytes,
        default=None,
    )
    compiled = {}
    if largest is not None:
        compiled = {
            "argument_bytes": largest.argument_size_in_bytes,
            "temporary_bytes": largest.temp_size_in_bytes,
        }
    measured = host_peak()
    return {
        "host_peak_bytes": max(taken.host_peak or 0, measured or 0) or None,
        "measured_host_peak_bytes": measured,
        "device_peak_bytes": device_peak(),
        **compiled,
    }


def _measured(taken: Taken, num_unmeasured: int) -> list[Step]:
    """Steps after the first ones; those that followed a compilation are none."""
    steps = [
        step
        for number, step in enumerate(taken.steps)
        if number >= num_unmeasured and number not in taken.first
    ]
    if not steps:
        raise ValueError(
            f"Each of the {len(taken.steps)} steps was the first of its rows' shape; "
            "take more --steps."
        )
    return steps


def _times(taken: Taken, measured: list[Step]) -> Figures:
    seconds = [step.seconds for step in measured]
    return {
        "step_seconds": statistics.median(seconds),
        "step_seconds_min": min(seconds),
        "first_step_seconds": taken.programs[0].seconds + taken.steps[0].seconds,
        "compile_seconds": sum(program.seconds for program in taken.programs),
        "programs": len(taken.programs),
        "seconds": seconds,
        "sequence_tokens": [num_sequence_tokens(step.batch) for step in measured],
        "losses": [step.loss for step in taken.steps],
    }


def _flops(
    measured: list[Step], loss: Loss, loaded: Loaded, policy: Policy
) -> list[float]:
    config, lora = loaded.model.config, loaded.model.lora
    return [
        step_flops(
            config,
            step.batch,
            has_reference="reference" in loss.needs and step.batch.reference is None,
            adapter_size=None if lora is None else num_parameters(policy.trained),
            trunk=0 if lora is None else lora.trunk(config.num_layers),
        )
        for step in measured
    ]


def _rates(measured: list[Step], flops: list[float]) -> Figures:
    """Of all measured steps together, since batches differ."""
    total = math.fsum(step.seconds for step in measured)
    positions = sum(num_positions(step.batch) for step in measured)
    sequence = sum(num_sequence_tokens(step.batch) for step in measured)
    room = sum(np.size(step.batch.tokens) for step in measured)
    return {
        "sequence_tokens_per_second": sequence / total,
        "computed_tokens_per_second": positions / total,
        "padding": 1 - positions / room,
        "flops_per_step": math.fsum(flops) / len(flops),
        "flops_per_second": math.fsum(flops) / total,
    }


def _show(figures: Figures) -> None:
    def megabytes(name: str) -> str:
        value = figures.get(name)
        return "unknown" if value is None else f"{value / 1e6:,.1f} MB"

    rows = [
        ("seconds per step, median", f"{figures['step_seconds']:.4f}"),
        ("seconds per step, least", f"{figures['step_seconds_min']:.4f}"),
        (
            "tokens/s, prompts twice",
            f"{figures['sequence_tokens_per_second']:,.0f}",
        ),
        ("tokens/s, as computed", f"{figures['computed_tokens_per_second']:,.0f}"),
        ("padding", f"{figures['padding']:.1%}"),
        ("model GFLOP per step", f"{figures['flops_per_step'] / 1e9:,.2f}"),
        ("model GFLOP/s", f"{figures['flops_per_second'] / 1e9:,.1f}"),
        (
            "matrix products, GFLOP/s",
            f"{figures['ceiling_flops_per_second'] / 1e9:,.1f}",
        ),
        ("share of these", f"{figures['flops_utilization']:.1%}"),
        ("host memory, peak", megabytes("host_peak_bytes")),
        ("the same after warming up", megabytes("measured_host_peak_bytes")),
        ("device memory, peak", megabytes("device_peak_bytes")),
        ("arguments of the step", megabytes("argument_bytes")),
        ("temporaries of the step", megabytes("temporary_bytes")),
        (
            "compilation, seconds",
            f"{figures['compile_seconds']:.1f} ({figures['programs']} programs)",
        ),
        ("first step, seconds", f"{figures['first_step_seconds']:.1f}"),
    ]
    title = (
        f"{figures['loss']} of {figures['model']}, {figures['parameters']:,} "
        f"parameters, {len(figures['seconds'])} steps of {figures['batch_size']} in "
        f"{figures['compute_dtype']} on {figures['devices']}"
    )
    show_table(title, ("", ""), rows)
