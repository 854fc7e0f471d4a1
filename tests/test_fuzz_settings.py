"""Random settings: of models in config.json, and of runs. Each works or is refused.

A few hundred here; `pytest -m fuzz` takes tens of thousands.
"""

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, get_args, get_type_hints

import pytest
from fuzzing import check_sentence, count_used, mutated, random_value
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import LLAMA, PHI4_MINI, SIZES

from dpojax.cli import main
from dpojax.config import LoraConfig, LossConfig, OptimizerConfig, TrainConfig
from dpojax.data.tokenize import load_tokenizer
from dpojax.examples import load_split
from dpojax.fitting import check_memory
from dpojax.losses.table import OBJECTIVES
from dpojax.models.decoder import DecoderConfig
from dpojax.models.families import as_decoder_config
from dpojax.models.family_table import FAMILIES
from dpojax.models.huggingface import read_settings
from dpojax.models.shape import layer_ropes, layer_windows
from dpojax.prepare import (
    check_training,
    configured_optimizer,
    configured_schedule,
    make_configured_loss,
    make_new_adapters,
)
from dpojax.sharding import make_mesh

GOOD = [LLAMA, PHI4_MINI, *(SIZES | {"model_type": name} for name in FAMILIES)]
KEYS = sorted(
    {key for family in FAMILIES.values() for key in (*family.keys, *family.renamed)}
    | {"rope_scaling", "rope_parameters", "layer_types", "architectures", "id2label"}
)
KINDS_OF_SCALING = ("default", "linear", "dynamic", "llama3", "longrope", "yarn")


def setting(random: Random) -> Any:
    """A value that some key of a config might have."""
    if random.random() < 0.5:
        return random_value(random)
    rope = {
        "rope_type": random.choice(KINDS_OF_SCALING),
        "factor": random.choice((0.5, 1.0, 8.0, 1e300)),
        "low_freq_factor": 1.0,
        "high_freq_factor": random.choice((1.0, 4.0)),
        "original_max_position_embeddings": random.choice((1, 4096)),
        "short_factor": [1.0] * 8,
        "long_factor": [random.choice((0.0, 2.0, -1.0))] * 8,
        "beta_fast": random.choice((1.0, 32.0)),
    }
    some = {key: rope[key] for key in rope if random.random() < 0.6}
    numbers = (0, 1, 2, 3, 4, 7, 64, 2**20, 2**31, 2**62, 0.0, 0.5, 1e-30)
    types = ["full_attention", "sliding_attention"]
    return random.choice((some, {types[0]: some}, types, [1, 0], *numbers, True))


def random_settings(random: Random) -> Any:
    """Contents of config.json, most of them near those of a family."""
    value: Any = random.choice(GOOD)
    for _ in range(random.choice((0, 1, 1, 2))):
        if random.random() < 0.3 and isinstance(value, dict):
            value = value | {random.choice(KEYS): setting(random)}
        else:
            value = mutated(value, random, setting)
    return value


def use_settings(directory: Path, random: Random) -> bool:
    """Whether a decoder has such a shape; otherwise one sentence refuses it."""
    text = json.dumps(random_settings(random))
    (directory / "config.json").write_text(text)
    try:
        config = as_decoder_config(read_settings(directory))
    except ValueError as error:
        check_sentence(error)
        return False
    check_shape(config)
    return True


def check_shape(config: DecoderConfig) -> None:
    """What a decoder is built of: sizes, and a window and a rotation a layer."""
    sizes = (
        config.vocabulary_size,
        config.width,
        config.num_layers,
        config.num_heads,
        config.num_key_heads,
        config.head_dimension,
        config.mlp_width,
        config.max_length,
    )
    assert all(type(size) is int and 0 < size < 2**31 for size in sizes)
    assert config.num_heads % config.num_key_heads == 0
    assert len(layer_windows(config)) == len(layer_ropes(config)) == config.num_layers
    turning = config.rotary_dimension or config.head_dimension
    if config.positions == "rotary":
        assert 0 < turning <= config.head_dimension and turning % 2 == 0
    assert 0 < config.rope_theta < float("inf") and config.norm_epsilon > 0
    repr(config)


# -- Runs --------------------------------------------------------------------------

_NUMBERS = (
    0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 10**30, -(10**30), 0.0, 0.5, -0.5, 1.5, 1e300,
    1e-300, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip


def random_setting(kind: Any, random: Random) -> Any:
    """A value of the kind that the command line would pass on."""
    choices = get_args(kind)
    if kind is bool:
        return random.random() < 0.5
    if kind is int:
        return random.choice([number for number in _NUMBERS if type(number) is int])
    if kind is float:
        return float(random.choice([n for n in _NUMBERS if abs(n) != 10**30]))
    if kind is str:
        return random.choice(("dpo", "", "a:b", "0.5*dpo+nan*sft", "/", "x" * 99))
    if type(None) in choices:
        others = [choice for choice in choices if choice is not type(None)]
        return None if random.random() < 0.2 else random_setting(others[0], random)
    if choices and not isinstance(choices[0], type) and not get_args(choices[0]):
        return random.choice(choices)  # literals
    if choices[-1] is Ellipsis:
        count = random.randrange(3)
        return tuple(random_setting(choices[0], random) for _ in range(count))
    return {}


def changed(config: Any, random: Random) -> Any:
    """The settings with one or two of them changed."""
    kinds = get_type_hints(type(config))
    for _ in range(random.randrange(1, 3)):
        name = random.choice([field.name for field in fields(config)])
        value = vars(config)[name]
        if is_dataclass(value):
            new = changed(value, random)
        else:
            new = random_setting(kinds[name], random)
        config = replace(config, **{name: new})
    return config


def use_run(base: TrainConfig, tokenizer: Any, random: Random) -> bool:
    """Whether a run would begin with such settings; otherwise a sentence refuses."""
    loss = LossConfig(name=random.choice([*OBJECTIVES, "0.8*dpo+0.2*sft"]))
    config = changed(replace(base, loss=loss), random)
    try:
        made = make_configured_loss(config.loss)
        make_mesh(**vars(config.mesh))
        check_training(config, made)
        check_memory(config, made)
        make_new_adapters(config.lora)
        schedule = configured_schedule(config.optimizer, 1e-6, config.steps or 10)
        configured_optimizer(config.optimizer, schedule)
        if config.data == base.data:
            load_split(config, made, tokenizer, config.train_split)
    except ValueError as error:
        check_sentence(error)
        return False
    return True


@pytest.fixture(scope="module")
def base(place: Path) -> TrainConfig:
    return TrainConfig(
        model=str(place / "model"),
        data=(str(place / "pairs.jsonl"),),
        optimizer=OptimizerConfig(),
        lora=LoraConfig(),
    )


@given(st.integers(0, 2**62))
@settings(max_examples=500)
def test_a_random_config_is_a_decoders_shape_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, seed: int
):
    use_settings(tmp_path_factory.getbasetemp(), Random(seed))


def test_random_settings_of_a_run_work_or_get_one_sentence(base: TrainConfig):
    tokenizer = load_tokenizer(str(base.model))
    for seed in range(150):
        use_run(base, tokenizer, Random(seed))


@pytest.mark.fuzz
def test_of_very_many_configs_each_is_a_shape_or_one_sentence(tmp_path: Path):
    num_used, number = count_used(lambda random: use_settings(tmp_path, random))
    print(f"{number} config.json: {num_used} are shapes, the others one sentence.")
    assert 0.1 < num_used / number < 0.9


@pytest.mark.fuzz
def test_of_very_many_settings_of_runs_each_works_or_gets_one_sentence(
    base: TrainConfig,
):
    tokenizer = load_tokenizer(str(base.model))
    num_used, number = count_used(lambda random: use_run(base, tokenizer, random))
    print(f"{number} settings of runs: {num_used} work, the others get one sentence.")
    assert 0.1 < num_used / number < 0.9


@pytest.mark.parametrize(
    "arguments",
    [
        "train --model \0 --data x.jsonl",
        "train --model nowhere/at-all --data nothing.jsonl --steps 9999999999999999",
        "train --model . --data . --test-size nan",
        "train --model . --data . --loss 1e999*dpo",
        "train --model . --data . --mesh.fsdp 0",
    ],
)
def test_what_the_command_line_cannot_use_gets_one_sentence(
    arguments: str, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split(" "))
    assert stopped.value.code == 2
    assert "Traceback" not in capfd.readouterr().err
