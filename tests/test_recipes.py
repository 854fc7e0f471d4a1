"""The published runs in `experiments/`: each builds, and says what it is and where."""

import json
import math
import re
from pathlib import Path

import jax
import pytest
import yaml

from dpojax.config import TrainConfig
from dpojax.fitting import check_memory
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.prepare import (
    check_training,
    configured_optimizer,
    configured_schedule,
    make_configured_loss,
    make_new_adapters,
)
from dpojax.user_code import load_names

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
RECIPES = [
    path
    for path in sorted(EXPERIMENTS.glob("*.py"))
    if "\nSlice: " in path.read_text("utf-8")
]
# Of the models' cards and papers: parameters, whatever is tied counted once.
NUM_PARAMETERS = {
    "Llama-3.1-Tulu-3-8B-SFT": 8_030_326_784,
    "Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "pythia-2.8b": 2_775_208_960,
    "smollm2-1.7B-sft": 1_711_376_384,
    "zephyr-7b-sft-full": 7_241_732_096,
}

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def load(path: Path) -> tuple[TrainConfig, str]:
    """A recipe's configuration, and its docstring in one line."""
    names = load_names(path, "experiment")
    return names["config"](), " ".join(names["__doc__"].split())


def find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, (pattern, text)
    return found[1]


@each_recipe
def test_a_recipe_passes_every_check_that_needs_no_model(path: Path):
    config, _ = load(path)
    loss = make_configured_loss(config.loss)
    check_training(config, loss)
    assert check_memory(config, loss) is None
    assert (make_new_adapters(config.lora) is None) == (config.lora.rank is None)
    schedule = configured_schedule(config.optimizer, math.nan, num_steps=1_000)
    configured_optimizer(config.optimizer, schedule)
    warmup = config.optimizer.warmup_steps
    peak = math.ceil(warmup * 1_000 if warmup < 1 else warmup)
    assert schedule(peak) == pytest.approx(config.optimizer.learning_rate)


@each_recipe
def test_a_mesh_fills_the_slice_and_its_rows_fill_the_mesh(path: Path):
    config, text = load(path)
    sides = find(r"Slice: v\w+:([\dx]+),", text).split("x")
    num_chips = math.prod(map(int, sides))
    mesh = config.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor == num_chips
    assert config.batch_size % (config.microbatches * mesh.data * mesh.fsdp) == 0


@each_recipe
def test_a_recipe_names_its_sources_its_slice_and_that_it_was_not_run(path: Path):
    config, text = load(path)
    assert "Not run here" in text and "Sources: " in text
    assert find(r"Command: dpojax train experiments/(\S+)\.py", text) == path.stem
    assert find(r"Plan: dpojax plan experiments/(\S+)\.py", text) == path.stem
    topology = find(r"--topology (\S+)", text)
    assert topology == find(r"Slice: ([^,]+),", text)
    shape = ROOT / find(r"--model (\S+)", text)
    assert (shape / "config.json").is_file()
    assert config.model is not None
    assert config.model.endswith(shape.name) or config.model.startswith("runs/")
    assert (config.microbatches == 1) == ("one microbatch," in text)
    assert config.remat == "full" and config.compute_dtype == "bfloat16"


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_a_shape_has_the_parameters_that_its_model_has(name: str):
    settings = json.loads((EXPERIMENTS / "shapes" / name / "config.json").read_text())
    params = make_model(as_decoder_config(settings)).params
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert total == NUM_PARAMETERS[name]


def test_every_shape_is_counted_and_every_recipe_is_in_the_table():
    shapes = {path.name for path in (EXPERIMENTS / "shapes").iterdir()}
    assert shapes == NUM_PARAMETERS.keys()
    text = (EXPERIMENTS / "README.md").read_text("utf-8")
    rows = {row[0]: row for row in re.findall(r"\| `(\w+)\.py` \|(.*)", text)}
    assert rows.keys() >= {path.stem for path in RECIPES} and len(RECIPES) == 7
    for path in RECIPES:
        config, docstring = load(path)
        row = rows[path.stem][1]
        assert f"`{config.loss.name}`" in row
        assert find(r"Slice: ([^,]+),", docstring) in row


def test_the_readmes_jobset_has_a_host_for_every_four_chips_of_its_recipes_slice():
    text = (ROOT / "README.md").read_text("utf-8")
    block = find(r"(?s)```yaml\n(.*?)```", text)
    (job,) = yaml.safe_load(block)["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]
    pod = hosts["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    command = container["command"][-1]
    config, docstring = load(ROOT / find(r"train (\S+)", command))
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert "\n" not in command and f"Slice: v5e:{topology}," in docstring
    assert hosts["parallelism"] == hosts["completions"] == config.mesh.fsdp // chips
