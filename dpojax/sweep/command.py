"""The sweep command: a grid of runs, by as few programs as they need.

    OUTPUT/sweep.json    see `dpojax.sweep_list`
    OUTPUT/0, OUTPUT/1   run directories

This file reads settings and decides what is trained in which order.
"""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import jax

from dpojax.command_config import SweepConfig
from dpojax.config import TrainConfig
from dpojax.fit import device_memory
from dpojax.loading import new_directory
from dpojax.preemption import preemption
from dpojax.prepare import check_training
from dpojax.progress import say
from dpojax.run_directory import default_name
from dpojax.sharding import make_mesh
from dpojax.sweep.board import Board
from dpojax.sweep.extent import blocks, extent_of, extents
from dpojax.sweep.grid import expand
from dpojax.sweep.grouping import Trial, as_trials, in_programs
from dpojax.sweep.halving import better_half, rungs
from dpojax.sweep.program import Program
from dpojax.sweep.wave import IsPreempted, train_wave
from dpojax.sweep_list import read_list, write_list


def sweep(config: SweepConfig) -> Path:
    """Trains every run of a grid.

    Returns:
      Where their directories are.

    Raises:
      ValueError: for settings that cannot be, of any of the runs, before anything is
        loaded.
    """
    _check(config)
    shared = TrainConfig(
        **{each.name: vars(config)[each.name] for each in fields(TrainConfig)}
    )
    shared = replace(shared, resume=False, memory_limit=None)
    output = Path(config.output or default_name("sweep"))
    points = expand(shared, config.over, config.seeds)
    trials = as_trials(points, str(output))
    for trial in trials:
        check_training(trial.config, trial.loss)
    groups = in_programs(trials, points)
    if config.search == "halving" and len(groups) > 1:
        raise ValueError(
            f"--search halving compares runs of one program, and these take "
            f"{len(groups)}: they may differ in the loss, its settings, the learning "
            "rate and the seed only."
        )
    changes = [trial.changes for trial in trials]
    _check_output(output, config, changes)
    with preemption() as is_preempted, Board(trials) as board:
        for group in groups:
            program = _make_program(config, group)
            stops = _stops(config, program, group)
            if not config.resume and group is groups[0]:
                # Only now: what was refused above leaves no directory behind.
                write_list(output, config.search, changes)
            if _train(program, group, stops, is_preempted, board):
                say("Told to end; continue with --resume.")
                break
    say(f"The runs are in {output}; dpojax report {output} compares them.")
    return output


def _check(config: SweepConfig) -> None:
    """Refuses what a sweep does not take, or what would have no effect on it."""
    if not config.over and config.seeds == 1:
        raise ValueError(
            "A sweep needs something to vary: --over loss.beta=0.1,0.5 or --seeds 3."
        )
    if config.parallel is not None and config.parallel < 1:
        raise ValueError(f"--parallel is {config.parallel}; it must be positive.")
    if config.fit:
        raise ValueError(
            "A sweep finds by itself how many runs fit; leave out --fit, and give "
            "--memory-limit where a device may use less than it has."
        )
    if config.parallel is not None and config.memory_limit is not None:
        raise ValueError(
            "--memory-limit decides how many runs are trained at one time, and so does "
            "--parallel; give one of them."
        )
    if config.checkpoints is not None:
        raise ValueError(
            "Runs of a sweep keep their checkpoints in their own directories; leave "
            "out --checkpoints."
        )
    if config.offload:
        raise ValueError(
            "The states of many runs stay on the device; leave out --offload, and "
            "train fewer at one time by --parallel."
        )
    if set(config.track) - {"tensorboard"}:
        raise ValueError(
            "wandb and trackio take one run at a time, and a sweep trains many; give "
            "--track tensorboard, or none."
        )
    if config.distributed.method != "none":
        raise ValueError("A sweep is trained by one process; leave out --distributed.")
    if config.keep_last < 2:
        raise ValueError(
            "Runs of a sweep go on from a step that all of them have; --keep-last must "
            "be at least 2."
        )


def _make_program(config: SweepConfig, trials: Sequence[Trial]) -> Program:
    mesh = make_mesh(**vars(trials[0].config.mesh))
    whole, most, memory = extent_of(trials), config.parallel, None
    halving = config.search == "halving"
    if most is None:
        most = len(trials)
        if config.memory_limit is not None or jax.default_backend() != "cpu":
            memory = device_memory(config.memory_limit)
        if halving:
            # With a quarter at one time, two halvings fill programs whole.
            whole = whole._replace(combinations=math.ceil(whole.combinations / 4))
    divided = extents(whole, whole_seeds=halving)
    small = [extent for extent in divided if extent.num_runs <= most]
    program = Program(trials, mesh, small, memory)
    say(
        f"{len(trials)} runs of {program.num_steps:,} steps, "
        f"{program.extent.num_runs} at one time in one program."
    )
    return program


def _stops(config: SweepConfig, program: Program, trials: Sequence[Trial]) -> list[int]:
    """The steps up to which runs are trained, one after another; runs fall out between.

    Raises:
      ValueError: as `rungs`; where none would fall out.
    """
    steps, every = program.num_steps, config.evaluate_every
    if config.search == "all":
        return [steps]
    all_, width = extent_of(trials).combinations, program.extent.combinations
    found = rungs(all_, width, steps, every)
    if not found:
        raise ValueError(
            f"--search halving would drop none of {all_} combination(s), all of which "
            "are trained at one time; leave it out, or lower --parallel."
        )
    return [*found, steps]


def _train(
    program: Program,
    trials: Sequence[Trial],
    stops: Sequence[int],
    is_preempted: IsPreempted,
    board: Board,
) -> bool:
    """Trains the runs of one program; whether it was told to end."""
    for step in stops:
        for block in blocks(trials, program.extent):
            if train_wave(program, block, min(step, program.stop), is_preempted, board):
                return True
        if step >= program.stop:
            break
        kept = better_half(trials, step)
        for trial in trials:
            if trial not in kept:
                board.show(trial.number, f"dropped at {step}")
        trials = kept
    return False


def _check_output(
    output: Path, config: SweepConfig, changes: list[dict[str, str]]
) -> None:
    """Refuses to write where something is, or to resume another sweep.

    Raises:
      ValueError: for a directory that is not new, or not of this sweep.
    """
    if not config.resume:
        new_directory(str(output))
        return
    there = read_list(output)
    if config.output is None or there is None:
        raise ValueError("--resume needs the --output of a sweep that has started.")
    if there != (config.search, changes):
        raise ValueError(
            f"{output} is another sweep: its sweep.json lists other runs; give the "
            "same --over, --seeds and --search to resume it."
        )
