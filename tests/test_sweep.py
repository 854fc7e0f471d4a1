"""Sweeps: each of many runs in one program is the run that it would be alone."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quick_flags
from safetensors.numpy import load_file
from test_run import metrics_of
from test_trackers import events_of, lines_of

from dpojax.bench_inputs import shape_settings
from dpojax.command_config import PlanConfig, ShapeConfig, SweepConfig
from dpojax.config import (
    LoraConfig,
    LossConfig,
    MovingConfig,
    OptimizerConfig,
    TrainConfig,
)
from dpojax.data.packing import Example, as_batch
from dpojax.fit import SHARE, needed
from dpojax.gradient import Judge, as_judge, denominators
from dpojax.losses.make import make_loss
from dpojax.losses.scores import Scores
from dpojax.measure import Measured
from dpojax.planning.rows import first_batch, plan_examples
from dpojax.planning.shapes import plan_model, plan_policy
from dpojax.run import run
from dpojax.sharding import make_mesh
from dpojax.sweep import command
from dpojax.sweep.command import sweep
from dpojax.sweep.extent import Extent, blocks, extent_of, extents
from dpojax.sweep.grid import expand
from dpojax.sweep.grouping import as_trials, in_programs
from dpojax.sweep.halving import rungs
from dpojax.sweep.objectives import Objectives
from dpojax.sweep.program import Program
from dpojax.sweep.stacked import as_lanes, make_stacked
from dpojax.train_step import assess
from dpojax.training import make_training
from dpojax.user_code import load_names


def as_sweep(config: TrainConfig, output: Path, **settings: Any) -> SweepConfig:
    return replace(SweepConfig(**vars(config)), output=str(output), **settings)


def weights_of(directory: Path) -> dict[str, np.ndarray]:
    return load_file(next((directory / "final").glob("*.safetensors")))


def assert_same_run(found: Path, expected: Path) -> None:
    """The same lines, and the same weights to 1e-5."""
    lines, others = metrics_of(found), metrics_of(expected)
    assert [list(row) for row in lines] == [list(row) for row in others]
    for one, two in zip(lines, others, strict=True):
        for name in ("loss", "logps/chosen", "learning_rate"):
            ours, theirs = one.get(name, 0), two.get(name, 0)
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        # Of small gradients of many tokens less is left.
        norms = one.get("grad_norm", 0), two.get("grad_norm", 0)
        np.testing.assert_allclose(*norms, rtol=1e-4)
    ours, theirs = weights_of(found), weights_of(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


def files_of(output: Path, number: int) -> dict[str, Any]:
    """What a run measured and trained, without times; equal means equal bits."""
    directory = output / str(number)
    each = (directory / "held_out.jsonl").read_text("utf-8")
    weights = {k: v.tobytes() for k, v in weights_of(directory).items()}
    return {"metrics": metrics_of(directory), "each": each, "weights": weights}


@pytest.fixture(scope="module")
def config(config: TrainConfig) -> TrainConfig:
    """Six steps; adapters."""
    return replace(
        config,
        steps=6,
        log_every=2,
        evaluate_every=3,
        save_every=3,
        sample_prompts=0,
        lora=LoraConfig(rank=4, alpha=8.0),
    )


LOSSES = "loss=dpo,bco_pair"  # of which one keeps statistics


@pytest.fixture(scope="module")
def swept(config: TrainConfig, place: Path) -> Path:
    tracked = replace(config, track=("tensorboard",))
    return sweep(as_sweep(tracked, place / "swept", over=(LOSSES,), seeds=2))


# -- Settings -------------------------------------------------------------------------


def test_a_grid_is_every_combination_the_last_field_fastest_then_seeds():
    over = ("loss=dpo,0.8*dpo+0.2*sft", "--optimizer.learning-rate=1e-6,5e-6")
    points = expand(TrainConfig(seed=3), over, 2)
    settings = [
        (one.config.loss.name, one.config.optimizer.learning_rate, one.config.seed)
        for one in points
    ]
    losses, rates = ("dpo", "0.8*dpo+0.2*sft"), (1e-6, 5e-6)
    assert settings == list(product(losses, rates, (3, 4)))
    changes = {"loss": "dpo", "optimizer.learning_rate": "5e-6", "seed": "4"}
    assert points[3].changes == changes


@pytest.mark.parametrize(
    ("over", "seeds", "reason"),
    [
        (("loss.bta=1,2",), 1, "did you mean loss.beta?"),
        (("loss.beta",), 1, "is no field with values"),
        (("loss.beta=1,1.0",), 1, "lists 1 twice"),
        (("loss.beta=1", "beta=2"), 1, "did you mean"),
        (("loss.beta=1", "loss.beta=2"), 1, "gives loss.beta twice"),
        (("loss.beta=high",), 1, "does not take 'high'"),
        (("seed=1,2",), 2, "not both"),
        (("output=a,b",), 1, "all runs of a sweep share it"),
        ((), 0, "--seeds is 0"),
    ],
)
def test_fields_and_values_that_cannot_be_are_refused(
    over: tuple[str, ...], seeds: int, reason: str
):
    with pytest.raises(ValueError, match=re.escape(reason)):
        expand(TrainConfig(), over, seeds)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "something to vary"),
        ({"seeds": 2, "parallel": 0}, "--parallel is 0"),
        ({"seeds": 2, "fit": True}, "leave out --fit"),
        ({"seeds": 2, "offload": ("optimizer",)}, "leave out --offload"),
        ({"seeds": 2, "keep_last": 1}, "at least 2"),
        ({"seeds": 2, "track": ("wandb",)}, "give --track tensorboard"),
        ({"over": ("loss=dpo,sft", "loss.beta=1,2")}, "has no setting 'beta'"),
        ({"over": ("batch_size=2,4",), "search": "halving"}, "of one program"),
        ({"seeds": 2, "search": "halving"}, "would drop none of 1 combination(s)"),
    ],
)
def test_sweeps_that_cannot_be_are_refused_and_leave_nothing(
    config: TrainConfig, tmp_path: Path, settings: dict[str, Any], reason: str
):
    with pytest.raises(ValueError, match=re.escape(reason)):
        sweep(as_sweep(config, tmp_path / "sweep", **settings))
    assert not (tmp_path / "sweep").exists()


def test_runs_share_a_program_unless_the_model_the_data_or_the_optimiser_differ():
    config = TrainConfig(reference="somewhere")

    def programs(*over: str, seeds: int = 1, **settings: Any) -> list[list[int]]:
        points = expand(replace(config, **settings), over, seeds)
        grouped = in_programs(as_trials(points, "here"), points)
        return [[trial.number for trial in group] for group in grouped]

    assert programs("loss=dpo,ipo,simpo", "loss.beta=1,2", seeds=2) == [[*range(12)]]
    assert programs("optimizer.beta2=0.9,0.99", "optimizer.learning-rate=1,2") == [
        [0, 1],
        [2, 3],
    ]
    assert programs("batch_size=2,4") == [[0], [1]]
    assert programs("loss=dpo,kto,bco_pair") == [[0, 2], [1]]
    dropped = LoraConfig(rank=4, dropout=0.1)
    assert programs("loss=dpo,ipo", seeds=2, lora=dropped) == [[0, 2], [1, 3]]


def test_runs_are_split_into_the_fewest_parts_of_as_few_seeds_as_can_be():
    """Of two seeds with eight runs each three parts of six are fewer than four."""
    found = extents(Extent(2, 8))
    assert found[:4] == [(2, 8), (1, 8), (2, 4), (2, 3)]
    assert {(1, 4), (1, 1)} < set(found) and found[-1] == (1, 1)
    assert extents(Extent(2, 8), whole_seeds=True)[:3] == [(2, 8), (2, 4), (1, 8)]
    points = expand(TrainConfig(), ("loss.beta=1,2,3",), 3)
    parts = blocks(as_trials(points, "here"), Extent(2, 2))
    numbers = [[[one.number for one in some] for some in part] for part in parts]
    assert numbers == [[[0, 3], [1, 4]], [[6], [7]], [[2, 5]], [[8]]]


@pytest.mark.parametrize(
    ("num", "width", "steps", "expected"),
    [(8, 2, 80, [20, 40]), (8, 8, 80, []), (6, 2, 100, [30, 50]), (3, 2, 7, [5])],
)
def test_by_hand_rungs_are_evaluations_at_halves_of_the_run(
    num: int, width: int, steps: int, expected: list[int]
):
    """Rungs at 20 and 40; none where all fit; 25 is rounded up to 30, 3.5 to 5."""
    assert rungs(num, width, steps, every=10 if steps > 7 else 5) == expected


# -- Objectives -----------------------------------------------------------------------


def test_each_of_several_objectives_is_what_it_is_alone():
    """Loss, metrics, figures, statistics and gradient, mapped over their numbers."""
    names = ("dpo", "simpo", "0.8*dpo+0.2*sft", "bco_pair")
    losses = [make_loss(name) for name in names]
    objectives, num = Objectives(losses), len(losses)
    keys = iter(jax.random.split(jax.random.key(0), 9))
    rows, slots = 3, 2
    policy, reference = (
        -9 * jax.random.uniform(next(keys), (num, rows, slots, 2)) for _ in range(2)
    )
    length = 1 + jax.random.randint(next(keys), (rows, slots, 2), 0, 9)
    batch = as_batch(
        [
            [Example(np.ones(2, np.int32), (np.ones(n, np.int32),) * 2)] * slots
            for n in range(1, rows + 1)
        ],
        length=32,
        num_slots=slots,
        num_completions=2,
    )
    running = {k: v for loss in losses for k, v in loss.initial_running().items()}

    def measured(policy: Any, reference: Any) -> Measured:
        return Measured(Scores(policy, reference, length), None)

    def value(judge: Judge, policy: Any, reference: Any, running: Any) -> Any:
        found, by = measured(policy, reference), denominators(batch)
        running = judge.update_running(running, found.scores)
        loss, sums = judge.judge(found, batch, running, by)
        return loss, (sums, running)

    take = jax.value_and_grad(value, argnums=1, has_aux=True)

    @jax.jit
    def every(policy: Any, reference: Any) -> Any:
        def one(number: Any, policy: Any, reference: Any) -> Any:
            taken = take(objectives.judge(number), policy, reference, running)
            found = measured(policy, reference)
            return taken, objectives.assess(number, found, batch, running)

        return jax.vmap(one)(jnp.arange(num), policy, reference)

    together = every(policy, reference)
    for number, loss in enumerate(losses):
        own = jax.tree.map(lambda array, at=number: array[at], together)
        (result, (sums, after)), slope = own[0]
        ours = reference[number] if "reference" in loss.needs else None
        start = loss.initial_running()
        alone = jax.jit(partial(take, as_judge(loss)))
        (expected, (metrics, then)), gradient = alone(policy[number], ours, start)
        found = measured(policy[number], ours)
        figures = jax.jit(partial(assess, loss))(found, batch, start)
        known = objectives.names(number, measured(policy[0], reference[0]), batch)
        assert known == (metrics.keys(), figures[1].keys())
        pairs = (
            (result, expected),
            (slope, gradient),
            ({k: sums[k] for k in metrics}, metrics),
            ({k: after[k] for k in then}, then),
            ({k: own[1][0][k] for k in figures[0]}, figures[0]),
            ({k: own[1][1][k] for k in figures[1]}, figures[1]),
        )
        for one, two in pairs:
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), one, two)


@pytest.mark.slow
def test_with_adapters_a_reference_costs_one_pass_however_many_runs_there_are():
    """FLOPs of the step before it is compiled, of eight runs and of two."""
    mesh, loss = make_mesh(data=4), make_loss("dpo")
    shape = ShapeConfig(name="4x256", layers=2, width=64, heads=2, mlp_width=128)
    config = PlanConfig(
        shape=shape,
        lora=LoraConfig(rank=4),
        remat="full",
        compute_dtype="float32",
        prompt_tokens=16,
        completion_tokens=16,
        batch_size=4,
    )

    def flops(runs: int, reference: str | None) -> float:
        how = replace(config, reference=reference)
        loaded = plan_model(how, shape_settings(shape), loss, mesh)
        policy = plan_policy(how, loss, loaded, mesh)
        shapes = make_training(how, loss, loaded, policy, mesh, 9).shapes
        examples = plan_examples(how, loss, loaded)
        stacked = make_stacked(
            how,
            Objectives([loss]),
            loaded,
            policy,
            mesh,
            num_steps=9,
            movement=None,
            shapes=shapes,
            extent=Extent(1, runs),
        )
        lanes = as_lanes([[0] * runs], [[1e-5] * runs])
        batch = jax.tree.map(lambda x: x[None], first_batch(how, loss, examples, 4))
        lowered = stacked.step.lower(stacked.shapes, lanes, policy.frozen, batch)
        found = lowered.cost_analysis()
        assert found is not None
        return found["flops"]

    two, eight = (flops(runs, "precomputed") for runs in (2, 8))
    assert eight > 3.9 * two
    pass_of_two, pass_of_eight = flops(2, None) - two, flops(8, None) - eight
    assert 0 < pass_of_eight < 1.1 * pass_of_two


# -- Whole sweeps ---------------------------------------------------------------------


def test_a_sweep_that_is_told_to_end_and_goes_on_leaves_the_same_bits(
    swept: Path, config: TrainConfig, place: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped = as_sweep(config, place / "stopped", over=(LOSSES,), seeds=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            command, "preemption", partial(nullcontext, lambda step: step == 4)
        )
        sweep(stopped)
    for number in range(4):
        assert (place / "stopped" / str(number) / "checkpoints" / "4").is_dir()
    with pytest.raises(ValueError, match="is another sweep"):
        sweep(replace(stopped, seeds=3, resume=True))
    # As if it was killed while one run wrote: all go back to what all of them have.
    shutil.rmtree(place / "stopped" / "1" / "checkpoints" / "4")
    sweep(replace(stopped, resume=True))
    for number in range(4):
        assert files_of(place / "stopped", number) == files_of(swept, number)


def test_a_run_of_a_sweep_is_a_run_that_can_be_repeated_and_resumed_alone(
    swept: Path, place: Path
):
    """The one that differs from the first in its loss and in its seed."""
    again = load_names(swept / "3" / "config.py", "config")["config"]()
    alone = run(replace(again, output=str(place / "alone"))).directory
    assert_same_run(swept / "3", alone)
    shutil.copytree(swept / "3", place / "copied")
    shutil.rmtree(place / "copied" / "checkpoints" / "6")
    resumed = run(replace(again, output=str(place / "copied"), resume=True))
    assert resumed.step == 6
    assert_same_run(swept / "3", resumed.directory)


def test_each_run_of_a_sweep_has_its_own_card_and_tracker(swept: Path):
    for number, loss in enumerate(("dpo", "dpo", "bco_pair", "bco_pair")):
        card = (swept / str(number) / "final" / "README.md").read_text("utf-8")
        assert "dpojax train" in card and f"- `{loss}`: " in card
        events, lines = (of(swept / str(number)) for of in (events_of, lines_of))
        assert events.keys() == lines.keys()
        assert events["train/loss"] == pytest.approx(lines["train/loss"])


# -- Minutes long ---------------------------------------------------------------------

MIXED = ("loss=dpo,ipo", "loss.beta=0.05,0.5")
ALL_DIFFERENT = (0, 5, 10, 15)  # of the sixteen, with two seeds
RATES = "optimizer.learning-rate=1e-3,"


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "seeds"), [("1e3", 1), ("1e30", 2)])
def test_a_run_that_diverges_does_not_change_a_bit_of_the_others(
    config: TrainConfig, tmp_path: Path, rate: str, seeds: int
):
    one, two = (
        sweep(as_sweep(config, tmp_path / x, over=(LOSSES, RATES + x), seeds=seeds))
        for x in (rate, "1e-2")
    )
    for number in range(4 * seeds):
        diverges = number // seeds % 2 == 1
        if not diverges:
            assert files_of(one, number) == files_of(two, number)
        elif rate == "1e30":  # of which nothing is a number after a step
            assert list((one / str(number) / "nan").glob("step-*/report.json"))
            assert not (one / str(number) / "final").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "rates"), [(4, "1e-3,3e-3"), (None, "1e-4,3e-4")])
def test_each_of_sixteen_mixed_runs_is_the_run_alone_after_twenty_steps(
    config: TrainConfig, tmp_path: Path, rank: int | None, rates: str
):
    """At ten times these rates what is rounded grows to some 1e-5 in twenty steps."""
    mixed = (*MIXED, f"optimizer.learning-rate={rates}")
    settings = replace(config, steps=20, lora=LoraConfig(rank=rank))
    sweep(as_sweep(settings, tmp_path / "sweep", over=mixed, seeds=2))
    points = expand(settings, mixed, 2)
    for number in ALL_DIFFERENT:
        config = replace(points[number].config, output=str(tmp_path / f"a{number}"))
        assert_same_run(tmp_path / "sweep" / str(number), run(config).directory)


ALL_WEIGHTS = LoraConfig()
VARIANTS = {
    "microbatches": ("loss=dpo,bco_pair", {"microbatches": 2}),
    "precomputed": ("loss=simpo,dpo", {"reference": "precomputed"}),
    "judged": ("loss=bco,apo_zero_unpaired", {}),
    "mismatched": ("loss.beta=0.1,0.5", {"loss": LossConfig(name="kto")}),
    "int8": ("loss.beta=0.1,1", {"optimizer": OptimizerConfig(moments="int8")}),
    "moving": (
        "loss=dpo,ipo",
        {"moving": MovingConfig(kind="tr_dpo", every=2), "lora": ALL_WEIGHTS},
    ),
    "skipping": ("optimizer.learning-rate=1e-3,1e30", {"on_nan": "skip"}),
}


@pytest.mark.sweeps
@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_runs_share_each_is_the_run_alone(
    config: TrainConfig, tmp_path: Path, variant: str
):
    over, settings = VARIANTS[variant]
    config = replace(config, **settings)
    sweep(as_sweep(config, tmp_path / "sweep", over=(over,), seeds=2))
    settings = expand(config, (over,), 2)[1].config  # of the second seed
    if settings.loss.name == "simpo":  # which has no use for it
        settings = replace(settings, reference=None)
    alone = run(replace(settings, output=str(tmp_path / "alone"))).directory
    assert_same_run(tmp_path / "sweep" / "1", alone)


@pytest.mark.sweeps
def test_runs_that_do_not_fit_the_memory_together_are_trained_in_fewer(
    config: TrainConfig, tmp_path: Path
):
    """A memory between what one run needs and what two do; then less than one."""
    points, mesh = expand(config, (LOSSES,), 1), make_mesh()
    trials = as_trials(points, str(tmp_path / "sweep"))
    both, single = extents(extent_of(trials))
    program = Program(trials, mesh, (both,), None)
    one, two = (needed(partial(program.compile_step, some)) for some in (single, both))
    assert one < two
    split = Program(trials, mesh, (both, single), (one + two) / 2 / SHARE)
    assert split.extent == single
    with pytest.raises(ValueError, match="Not even one run fits"):
        Program(trials, mesh, (both, single), one / 2)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.sweeps),
    ],
)
def test_halving_trains_the_better_half_on_and_a_resumed_search_is_the_same(
    config: TrainConfig, tmp_path: Path, seeds: int
):
    """Four rates, two at one time: after the evaluation at half, two go on."""
    over = ("optimizer.learning-rate=1e-4,1e-3,1e-2,3e-2",)
    how: dict[str, Any] = {"over": over, "search": "halving", "seeds": seeds}
    how["parallel"] = 2 * seeds
    whole = sweep(as_sweep(config, tmp_path / "whole", **how))
    numbers = range(4 * seeds)
    finished = {n for n in numbers if (whole / str(n) / "final").exists()}

    def figures(number: int) -> list[float]:
        (row,) = (
            row
            for row in metrics_of(whole / str(number))
            if (row["step"], row["split"]) == (3, "test")
        )
        return [row["rewards/accuracies"], row["rewards/margins"]]

    means = np.mean([[figures(n) for n in numbers[s::seeds]] for s in range(seeds)], 0)
    best = sorted(range(4), key=lambda rate: tuple(means[rate]))[-2:]
    assert finished == {rate * seeds + s for rate in best for s in range(seeds)}
    steps = {n: metrics_of(whole / str(n))[-1]["step"] for n in numbers}
    assert {n for n, step in steps.items() if step == 6} == finished
    stopped = as_sweep(config, tmp_path / "stopped", **how, stop_after=5)
    sweep(stopped)
    sweep(replace(stopped, stop_after=None, resume=True))
    for n in finished:
        assert files_of(tmp_path / "stopped", n) == files_of(whole, n)


ONE_DEVICE = """
import sys

from dpojax.cli import main

model, data, output = sys.argv[1:]
flags = ["--model", model, "--data", data, "--test-size", "4", "--max-length", "96",
         "--batch-size", "4", "--steps", "20", "--sample-prompts", "0"]
lora = ["--lora.rank", "4"]
for name, more in (("lora", lora), ("full", [])):
    sweep = f"{output}/{name}"
    grid = ["--over", "loss=dpo,ipo", "--over", "optimizer.learning-rate=1e-4,1e-3"]
    main(["sweep", *flags, *more, *grid, "--seeds", "2", "--output", sweep])
    main(["train", f"{sweep}/5/config.py", "--output", f"{sweep}-alone"])
"""


@pytest.mark.sweeps
def test_on_one_device_a_run_of_a_sweep_is_the_run_alone(place: Path, tmp_path: Path):
    """By the command line, in a process of its own; the other tests have four."""
    environment = os.environ | {"XLA_FLAGS": " ".join(quick_flags())}
    model, data = str(place / "model"), str(place / "pairs.jsonl")
    arguments = [sys.executable, "-c", ONE_DEVICE, model, data, str(tmp_path)]
    subprocess.run(arguments, env=environment, check=True)
    for name in ("lora", "full"):
        assert_same_run(tmp_path / name / "5", tmp_path / f"{name}-alone")
