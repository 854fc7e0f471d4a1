"""Writing model directories: whole or not at all, in files of a size, byte for byte."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from dpojax.models import write_weights
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.functional import Params
from dpojax.models.huggingface import (
    read_generation_settings,
    read_params,
    read_settings,
    write_model,
)
from dpojax.sharding import as_shardings, make_mesh
from dpojax.whole_files import whole_directory

SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GENERATION = {"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6}


@pytest.fixture(scope="module")
def params() -> Params:
    model = make_model(as_decoder_config(SETTINGS))
    return jax.jit(model.init)(jax.random.key(0))


def no_tokenizer(_: Path) -> None:
    pass


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def read(directory: Path) -> Params:
    like = make_model(as_decoder_config(read_settings(directory))).params
    return read_params(directory, like, as_shardings(like, make_mesh()))


def assert_same(one: Params, other: Params) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


# -- Files of weights --------------------------------------------------------------


def test_a_model_larger_than_a_shard_is_written_in_shards_with_an_index(
    params: Params, tmp_path: Path
):
    write_model(tmp_path, params, SETTINGS, no_tokenizer, max_shard_size=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors"
        for number in range(1, len(files) + 1)
    ]
    held = {}
    for file in files:
        assert (tmp_path / file).stat().st_size < 110_000
        with safe_open(tmp_path / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            held |= dict.fromkeys(opened.keys(), file)
    assert index["weight_map"] == held
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert index["metadata"] == {"total_parameters": count, "total_size": 4 * count}
    assert_same(read(tmp_path), params)
    layers = [re.search(r"layers\.(\d+)\.", name) for name in held]
    spread = {(match[1], held[match.string]) for match in layers if match is not None}
    # Layer 10 is after layer 9: a shard begins inside of a layer, or between two.
    assert len(spread) <= 12 + len(files)


def test_a_model_that_fits_one_file_has_no_index(params: Params, tmp_path: Path):
    write_model(tmp_path, params, SETTINGS, no_tokenizer)
    assert contents(tmp_path).keys() == {"model.safetensors", "config.json"}


def test_a_smaller_model_leaves_no_shard_of_the_one_that_it_replaces(
    params: Params, tmp_path: Path
):
    directory = tmp_path / "model"
    write_model(directory, params, SETTINGS, no_tokenizer, max_shard_size="100KB")
    write_model(directory, params, SETTINGS, no_tokenizer)
    assert contents(directory).keys() == {"model.safetensors", "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("max_shard_size", ["5GB", 100_000])
def test_the_same_weights_give_the_same_bytes_however_they_are_sharded(
    params: Params, tmp_path: Path, max_shard_size: int | str
):
    def written(name: str, params: Params) -> dict[str, bytes]:
        how: dict[str, Any] = {
            "generation_settings": GENERATION,
            "max_shard_size": max_shard_size,
        }
        write_model(tmp_path / name, params, SETTINGS, no_tokenizer, **how)
        return contents(tmp_path / name)

    once = written("once", params)
    assert written("again", params) == once
    assert written("read", read(tmp_path / "once")) == once
    sharded = jax.device_put(params, as_shardings(params, make_mesh(1, 2, 2)))
    assert written("sharded", sharded) == once


def test_the_host_holds_the_tensors_of_one_file_at_a_time(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gathered: list[int] = []
    gather, save = write_weights._gather, write_weights.save_file

    def counted(tensor: write_weights.NewTensor) -> np.ndarray:
        gathered.append(tensor.num_bytes)
        return gather(tensor)

    def saved(*args: Any, **kwargs: Any) -> None:
        assert 0 < sum(gathered) <= 100_000
        gathered.clear()
        save(*args, **kwargs)

    monkeypatch.setattr(write_weights, "_gather", counted)
    monkeypatch.setattr(write_weights, "save_file", saved)
    write_model(tmp_path, params, SETTINGS, no_tokenizer, max_shard_size=100_000)
    assert gathered == []


def test_transformers_reads_shards_that_we_write_and_we_read_its_own(
    params: Params, tmp_path: Path
):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_model(ours, params, SETTINGS, no_tokenizer, max_shard_size=100_000)
    loaded: Any = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    model.save_pretrained(theirs, max_shard_size=100_000)
    assert_same(read(theirs), params)
    keys = [
        json.loads((directory / "model.safetensors.index.json").read_text())
        for directory in (ours, theirs)
    ]
    assert keys[0]["metadata"] == keys[1]["metadata"]
    assert keys[0]["weight_map"].keys() == keys[1]["weight_map"].keys()


# -- Settings ----------------------------------------------------------------------


@pytest.mark.parametrize("generation", [None, GENERATION])
def test_generation_settings_are_handed_on_and_never_made_up(
    params: Params, tmp_path: Path, generation: dict[str, Any] | None
):
    write_model(
        tmp_path, params, SETTINGS, no_tokenizer, generation_settings=generation
    )
    assert read_generation_settings(tmp_path) == generation
    assert (tmp_path / "generation_config.json").exists() == (generation is not None)


@pytest.mark.parametrize("generation", [None, GENERATION])
def test_transformers_loads_a_written_model_without_a_warning(
    params: Params,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    generation: dict[str, Any] | None,
):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    write_model(
        tmp_path, params, SETTINGS, no_tokenizer, generation_settings=generation
    )
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            model = AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records
    wanted = (
        {"eos_token_id": 2, "bos_token_id": 1} if generation is None else GENERATION
    )
    for key, value in wanted.items():
        assert vars(model.generation_config)[key] == value


# -- Whole or not at all -----------------------------------------------------------


def test_a_directory_appears_only_when_it_is_whole(params: Params, tmp_path: Path):
    model = tmp_path / "model"

    def as_writer(text: str) -> Callable[[Path], None]:
        def write_tokenizer(directory: Path) -> None:
            (directory / "tokenizer.json").write_text(text)
            if not text:
                raise RuntimeError("The disk is full.")

        return write_tokenizer

    with pytest.raises(RuntimeError, match="disk is full"):
        write_model(model, params, SETTINGS, as_writer(""))
    assert not list(tmp_path.iterdir())
    write_model(model, params, SETTINGS, as_writer("first"))
    first = contents(model)
    with pytest.raises(RuntimeError, match="disk is full"):
        write_model(model, params, SETTINGS, as_writer(""))
    assert contents(model) == first
    write_model(model, params, SETTINGS, as_writer("second"))
    assert contents(model) == first | {"tokenizer.json": b"second"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path):
    for name in ("model", "model.unfinished", "model.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    with whole_directory(tmp_path / "model") as directory:
        (directory / "new").touch()
        assert list(contents(tmp_path / "model")) == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert list(contents(tmp_path / "model")) == ["new"]


def test_weights_of_bfloat16_are_written_as_such(params: Params, tmp_path: Path):
    low = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    write_model(tmp_path, low, SETTINGS, no_tokenizer, max_shard_size=50_000)
    assert read_settings(tmp_path)["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == 2 * count
    assert_same(read(tmp_path), jax.tree.map(lambda a: a.astype(jnp.float32), low))
