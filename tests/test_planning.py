"""Plans: the step is the run's own, figures are counted, the rest is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from dpojax.bench_inputs import shape_settings
from dpojax.cli import main
from dpojax.command_config import PlanConfig, ShapeConfig
from dpojax.config import LoraConfig, LossConfig, MeshConfig, TrainConfig
from dpojax.fit import Way
from dpojax.planning.chips import read_slice
from dpojax.planning.command import plan
from dpojax.planning.roofline import Roofline, make_roofline, speed_at
from dpojax.planning.rows import (
    Rows,
    first_batch,
    num_steps,
    plan_examples,
    scored_chunks,
)
from dpojax.planning.search import Candidate, Tried, mesh_shapes, search
from dpojax.planning.shapes import model_settings, plan_model, plan_policy
from dpojax.planning.step import plan_step
from dpojax.policy import load_policy, make_policy
from dpojax.prepare import make_configured_loss
from dpojax.sharding import make_mesh, num_row_shards
from dpojax.training import make_training

TINY = ShapeConfig(name="4x256", layers=2, width=128, heads=4, mlp_width=256)
LENGTHS: dict[str, Any] = {"prompt_tokens": 64, "completion_tokens": 32}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": LossConfig(name="simpo"), "microbatches": 2},
        {"loss": LossConfig(name="kto")},
        {"lora": LoraConfig(rank=2)},
        {"lora": LoraConfig(rank=2, kind="dora", dropout=0.1, layers=1)},
    ],
)
def test_a_planned_step_is_the_one_that_a_run_takes(
    model: Path, changes: dict[str, Any]
):
    settings = of_run(model)
    config = PlanConfig(**{**settings, **LENGTHS, **changes})
    loss, mesh = make_configured_loss(config.loss), make_mesh(1, -1, 1)

    shapes = plan_model(config, model_settings(config), loss, mesh)
    policy = plan_policy(config, loss, shapes, mesh)
    rows = plan_examples(config, loss, shapes)
    batch = first_batch(config, loss, rows, num_row_shards(mesh))
    planned = plan_step(config, loss, shapes, policy, mesh, batch, 10)

    run = TrainConfig(**{**settings, **changes})
    loaded = load_policy(run, loss, mesh)
    real = make_training(
        run, loss, loaded, make_policy(run, loss, loaded, mesh), mesh, 10
    )
    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        real.frozen,
    )
    expected = real.step.lower(real.shapes, frozen, planned.arguments[2])
    found = planned.training.step.lower(*planned.arguments)
    assert found.as_text() == expected.as_text()


def of_run(model: Path) -> dict[str, Any]:
    return {
        "model": str(model), "batch_size": 8, "remat": "full",
        "compute_dtype": "float32", "mesh": MeshConfig(data=1, fsdp=-1),
    }  # fmt: skip


def test_a_quantised_base_is_held_as_a_run_holds_it(model: Path):
    settings: dict[str, Any] = of_run(model)
    settings |= {"lora": LoraConfig(rank=2, base="int8")}
    config = PlanConfig(**settings, **LENGTHS)
    loss, mesh = make_configured_loss(config.loss), make_mesh(1, -1, 1)
    loaded = load_policy(TrainConfig(**settings), loss, mesh)
    shapes = plan_model(config, model_settings(config), loss, mesh)

    def held(array: Any) -> tuple:
        return array.dtype, array.sharding.shard_shape(array.shape)

    assert jax.tree.map(held, shapes.params) == jax.tree.map(held, loaded.params)


@pytest.mark.slow
def test_a_slice_compiled_for_fits_and_agrees_with_a_count_by_hand(
    capsys: pytest.CaptureFixture[str],
):
    pytest.importorskip("libtpu")
    config = PlanConfig(
        topology="v5e:2x2", batch_size=8, row_length=256, chunk_size=256,
        shape=ShapeConfig(name="4x256", layers=2, mlp_width=4096, vocabulary=1024),
        prompt_tokens=128, completion_tokens=64, json=True, num_examples=80,
        mesh=MeshConfig(data=1, fsdp=4),
    )  # fmt: skip
    figures = plan(config)
    assert json.loads(capsys.readouterr().out) == figures
    flops, memory = figures["flops"], figures["memory"]
    assert figures["fits"] and not figures["is_estimate"]
    assert flops["per_chip"] == pytest.approx(flops["by_hand_per_chip"], rel=0.05)
    assert flops["flash_kernels_per_chip"] > 0
    held = sum(
        memory[f"{name}_bytes"] for name in ("arguments", "outputs", "temporaries")
    )
    assert memory["peak_bytes"] == held - memory["aliased_bytes"] < memory["chip_bytes"]
    # Weights, two moments and the step's number: a quarter each, and the reference.
    assert memory["arguments_bytes"] > 4 * figures["parameters"]
    assert figures["steps"] == 10
    assert figures["speeds"][0]["hours"] * 3600 == pytest.approx(
        10 * figures["roofline"]["seconds"]
    )


GPU = PlanConfig(
    topology="h100:8", shape=ShapeConfig(name="llama-3-8b"), batch_size=16,
    prompt_tokens=1024, completion_tokens=512, mesh=MeshConfig(data=1, fsdp=8),
    num_examples=16_000,
)  # fmt: skip


def test_a_plan_of_gpus_is_an_estimate_and_says_so(capsys: pytest.CaptureFixture[str]):
    figures = plan(GPU)
    printed = capsys.readouterr().out
    assert printed.count("estimate: ") == 3 and "Nothing was compiled" in printed
    # Weights, moments and reference in float32, an eighth each; rows are small.
    held = 4 * 4 * 8_030_261_248 / 8
    assert figures["memory"]["arguments_bytes"] == pytest.approx(held, rel=1e-3)
    # 6 N tokens and 2 N of the reference, without embeddings, and attention.
    tokens = 16 * 2047
    assert figures["flops"]["model_per_chip"] == pytest.approx(
        8 * 7.5e9 * tokens / 8, rel=0.05
    )
    assert figures["steps"] == 1000 and figures["chips"] == 8


def test_without_the_size_of_the_data_no_hours_are_told():
    figures = plan(replace(GPU, num_examples=None))
    assert "steps" not in figures
    assert all("hours" not in speed for speed in figures["speeds"])
    assert num_steps(replace(GPU, steps=7), rows_of(GPU)) == 7


def rows_of(config: PlanConfig) -> Rows:
    loss, mesh = make_configured_loss(config.loss), make_mesh(-1, 1, 1)
    config = replace(config, shape=TINY, compute_dtype="float32", remat="full")
    model = plan_model(config, shape_settings(TINY), loss, mesh)
    return plan_examples(config, loss, model)


def test_a_step_too_large_for_gpus_has_no_times():
    figures = plan(replace(GPU, topology="h100:1", mesh=MeshConfig()))
    assert not figures["fits"]
    assert "speeds" not in figures and "roofline" not in figures


def test_a_search_recommends_what_is_fastest_of_what_fits():
    figures = plan(replace(GPU, search=True, mesh=MeshConfig()))
    tried = figures["search"]["tried"]
    times = [one["seconds"] for one in tried if one["seconds"] is not None]
    assert figures["roofline"]["seconds"] == min(times)
    assert any(one["seconds"] is None for one in tried)


def test_the_roofline_by_hand():
    """10 s of FLOPs, 4 s of memory, 12 s of links: at half speed 24 s."""
    found = make_roofline(
        flops=1000, memory_bytes=40, sent_bytes=36,
        peak_flops=100, memory_speed=10, interconnect_speed=3,
    )  # fmt: skip
    assert found == Roofline(10, 4, 12)
    assert (found.seconds, found.bound) == (12, "interconnect")
    speed = speed_at(0.5, found, tokens=480, model_flops=600, peak_flops=100)
    assert speed == (0.5, 24, 20, 0.25)


@pytest.mark.parametrize(
    ("topology", "chips", "links"),
    [("v5e:4x8", 32, 2), ("v5e:16x16", 256, 4), ("v5e:8x16", 128, 3),
     ("v5p:4x4x4", 64, 6), ("v5p:2x2x1", 4, 2), ("v6e:1x1", 1, 0)],
)  # fmt: skip
def test_links_of_a_slices_corner(topology: str, chips: int, links: int):
    found = read_slice(topology)
    assert found.num_chips == chips
    assert found.interconnect_speed == links * found.chip.link_speed


def test_scored_chunks_are_those_of_a_microbatch_on_a_device():
    """Rows of 64 scored positions, in two shards of two parts: two rows each."""
    config = replace(GPU, batch_size=8, **LENGTHS)
    batch = first_batch(config, make_configured_loss(config.loss), rows_of(config), 4)
    per_row = int(batch.scored[0].sum())
    assert scored_chunks(batch, 2, 2, per_row) == len(batch.tokens) / 4
    assert scored_chunks(batch, 1, 1, 10**6) == 1


def test_meshes_divide_chips_heads_and_rows():
    found = list(mesh_shapes(8, most_tensor=2, num_rows=4))
    assert found == [(4, 1, 1, 1, 2), (2, 2, 1, 1, 2), (1, 4, 1, 1, 2)]


def test_a_search_stops_where_nothing_can_be_faster():
    def candidate(remat: Any, bound: float, parts: int = 1) -> Candidate:
        return Candidate((1, 4, 1, 1, 1), Way(remat, parts), bound, bound)

    needed = {"none": None, "dots": 5.0, "full": 9.0}
    told: list[Tried] = []
    ways = [candidate("full", 5.0), candidate("none", 3.0), candidate("dots", 4.0)]
    more = candidate("full", 1.0, parts=2)._replace(guess=6.0)
    found = search([*ways, more], lambda one: needed[one.way.remat], told.append)
    assert found.best == candidate("dots", 4.0)
    assert [one.candidate.way.remat for one in told] == ["none", "dots"]
    assert found.num_left == 2  # too slow; of a mesh that is settled
    assert search(ways[1:2], lambda one: None, told.append).best is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--shape 4x256", "A plan is of a slice; give --topology"),
        ("--shape 4x256 --topology v9:2x2", "The topology 'v9:2x2' is not known"),
        ("--shape 4x256 --topology v5e:2x2x2", "has 3 axes; slices of v5e have 2"),
        ("--shape 4x256 --topology h100:4 --mesh.fsdp 3", "does not fit 4 devices"),
        ("--topology h100:4", "Give a --model with a config.json, or a --shape"),
        ("--shape 4x256 --topology h100:4", "give --prompt-tokens and"),
        ("--model no/where --topology h100:4", "planning downloads nothing"),
        ("--shape 4x256 --topology h100:4 --fit", "give --search"),
        ("--shape 4x256 --topology h100:4 --search --remat full", "leave out --remat"),
        (
            "--shape 4x256 --topology h100:1 --remat none --prompt-tokens 8 "
            "--completion-tokens 8",
            "What --remat none keeps",
        ),
        (
            "--shape 4x256 --topology h100:1 --efficiency 2 --prompt-tokens 8 "
            "--completion-tokens 8",
            "The efficiency 2 is no share of the roofline",
        ),
        (
            "--shape 4x256 --topology h100:1 --loss odpo --prompt-tokens 8 "
            "--completion-tokens 8",
            "needs more than prompts, completions and labels",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: str, sentence: str
):
    with pytest.raises(SystemExit):
        main(["plan", *arguments.split()])
    assert sentence in capsys.readouterr().err


def test_without_libtpu_a_plan_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    from dpojax.planning import slices

    monkeypatch.setattr(slices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dpojax\[plan\]'"):
        slices.slice_devices(read_slice("v5e:2x2"))


def test_an_experiment_file_is_planned_as_it_would_be_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    experiment = tmp_path / "experiment.py"
    experiment.write_text(
        "from dpojax.config import TrainConfig\n"
        f"def config(): return TrainConfig(model={str(tmp_path)!r}, batch_size=4)\n"
    )
    flags = "--topology h100:1 --prompt-tokens 64 --completion-tokens 32 --json"
    main(["plan", str(experiment), *flags.split()])
    figures = json.loads(capsys.readouterr().out)
    assert figures["step"]["examples"] == 4
    assert figures["parameters"] == 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48) + 160


SETTINGS = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
