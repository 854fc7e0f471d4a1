"""The bench command on models that take milliseconds."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpojax.bench import bench
from dpojax.bench_inputs import make_pairs, read_pairs, shape_settings
from dpojax.command_config import BenchConfig, ShapeConfig
from dpojax.config import LoraConfig, LossConfig
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.run_log import num_parameters

SHAPE = ShapeConfig(
    name="4x256", layers=1, width=16, heads=2, mlp_width=32, vocabulary=64
)
SMALL = BenchConfig(
    shape=SHAPE, steps=2, unmeasured_steps=1, batch_size=4, completion_tokens=8
)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("bench") / "figures.json"
    config = replace(SMALL, output=str(output), prompt_tokens=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpojax.bench.measure_ceiling", lambda dtype: 1e9)
        printed = bench(config)
    written = json.loads(output.read_text())
    assert written == printed
    return written


def test_by_hand_figures_of_a_benchmark(figures: dict[str, Any]):
    """4 pairs of 9 and twice 8 tokens: sequences of 17, 136 in all; 8 + 16 positions.

    Four devices get a row each, of 32 positions.
    """
    assert figures["sequence_tokens"] == [136, 136]
    assert len(figures["seconds"]) == 2 and figures["programs"] == 1
    assert figures["padding"] == 0.25
    seconds = sum(figures["seconds"])
    assert figures["sequence_tokens_per_second"] == pytest.approx(272 / seconds)
    assert figures["computed_tokens_per_second"] == pytest.approx(192 / seconds)
    flops = figures["flops_per_step"]
    matrices, pairs = 4 * 16**2 + 3 * 16 * 32, 36 + 2 * (8 * 8 + 36)
    forward = 2 * matrices * 96 + 4 * 16 * 4 * pairs + 2 * 64 * 16 * 64
    assert flops == 4 * forward
    assert figures["flops_utilization"] == pytest.approx(2 * flops / seconds / 1e9)


def test_the_steps_are_those_of_training(figures: dict[str, Any]):
    losses = figures["losses"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(losses) == 3 and losses[2] != losses[0]
    assert figures["temporary_bytes"] > 0


def test_shapes_of_the_hub_have_their_sizes():
    """Qwen2.5-0.5B has 494 million parameters and Llama-3.2-1B 1,236 million."""
    shapes = ShapeConfig(name="qwen2.5-0.5b"), ShapeConfig(name="llama-3.2-1b")
    for shape, millions in zip(shapes, (494.0, 1235.8), strict=True):
        params = make_model(as_decoder_config(shape_settings(shape))).params
        assert num_parameters(params) / 1e6 == pytest.approx(millions, abs=0.1)


def test_lengths_with_a_spread_have_the_mean_and_a_limit():
    config = replace(
        SMALL, batch_size=1000, prompt_tokens=50, completion_tokens=20, spread=0.6
    )
    pairs = make_pairs(config, 64)
    assert len(pairs) == 3000
    prompts = [len(pair.prompt) for pair in pairs]
    chosen = [len(pair.completions[0]) for pair in pairs]
    assert np.mean(prompts) == pytest.approx(50, rel=0.05)
    assert np.mean(chosen) == pytest.approx(20, rel=0.05)
    assert max(prompts) <= 200 and len(set(prompts)) > 50


def test_token_files_are_read_in_order_and_their_errors_name_the_line(tmp_path: Path):
    path = tmp_path / "tokens.jsonl"
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
        {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [63]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_pairs(path, 64)
    assert first.prompt.tolist() == [1, 2] and first.completions[1].tolist() == [4, 5]
    assert second.completions[1].tolist() == [63]
    with pytest.raises(ValueError, match="line 2 has an empty list or the token 63"):
        read_pairs(path, 63)
    path.write_text('{"prompt_ids": [1]}\n')
    with pytest.raises(ValueError, match="line 1 is not an object of prompt_ids"):
        read_pairs(path, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": ShapeConfig()}, "needs a --model, or one of --shape 4x256, 8x512"),
        ({"model": "somewhere"}, "Give a --model or a --shape, not both"),
        ({"data": ("pairs.jsonl",)}, "Data as text goes with a --model"),
        ({"log_every": 5}, "--log-every has no effect on a benchmark"),
        ({"max_length": 9}, "--max-length has no effect without --data"),
        ({"token_file": "x"}, "--completion-tokens has no effect on a --token-file"),
        ({"loss": LossConfig(name="kto")}, "'kto' needs more than pairs of tokens"),
        ({"lora": LoraConfig(rank=2, base="nf4")}, "nf4 needs weights to quantise"),
        ({"steps": None}, "takes None steps after 1"),
    ],
)
def test_settings_without_an_effect_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        bench(replace(SMALL, **changes))
