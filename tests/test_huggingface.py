"""Model directories: read as transformers reads them, written as it expects them.

Tiny random models; the trained one is `../shared/models/stories260k`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from dpojax.batch import Batch
from dpojax.generate import make_generate, pad_left
from dpojax.log_probs import logits_of
from dpojax.models.decoder import Model, make_model
from dpojax.models.families import as_decoder_config, as_settings
from dpojax.models.functional import Params
from dpojax.models.huggingface import (
    find_model,
    read_params,
    read_settings,
    write_model,
)
from dpojax.sharding import as_shardings, make_mesh

LENGTHS = [3, 12, 7, 1]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
}


class Loaded(NamedTuple):
    model: Model
    params: Params


def make_theirs(variant: str) -> Any:
    """A random model of transformers; biases and norms are random too."""
    torch = pytest.importorskip("torch")
    import transformers

    family, changes = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in theirs.named_parameters():
        if re.search("bias$|norm", name):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return theirs


def load(directory: Path, shardings: Any = None) -> Loaded:
    model = make_model(as_decoder_config(read_settings(directory)), remat="none")
    if shardings is None:
        whole = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: whole, model.params)
    return Loaded(model, read_params(directory, model.params, shardings))


def make_prompts(vocabulary_size: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(3, vocabulary_size, (len(LENGTHS), max(LENGTHS)))


def our_logits(loaded: Loaded) -> np.ndarray:
    """Logits of the ragged prompts, one after another: ``[tokens, vocabulary]``."""
    tokens = jnp.asarray(make_prompts(loaded.model.config.vocabulary_size), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    example = (index < jnp.array(LENGTHS)[:, None]).astype(jnp.int32)
    zeros = jnp.zeros_like(tokens)
    lengths = jnp.zeros((len(LENGTHS), 1, 1), jnp.int32)
    supervision = jnp.zeros(lengths.shape), jnp.ones(lengths.shape[:2])
    batch = Batch(tokens, zeros, index * example, example, zeros, lengths, *supervision)

    @jax.jit
    def compute(params: Params, batch: Batch) -> jax.Array:
        hidden, output = loaded.model.apply(params, batch)
        return logits_of(hidden, output)

    return np.asarray(compute(loaded.params, batch))[np.asarray(example) > 0]


def their_logits(theirs: Any) -> np.ndarray:
    import torch

    tokens = torch.tensor(make_prompts(theirs.config.vocab_size))
    mask = torch.arange(tokens.shape[1]) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        logits = theirs(input_ids=tokens, attention_mask=mask.long()).logits
    return logits[mask].float().numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape == (sum(LENGTHS), expected.shape[1])
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def assert_same(one: Params, other: Params) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_saved_by_transformers_gives_its_logits(variant: str, tmp_path: Path):
    theirs = make_theirs(variant)
    theirs.save_pretrained(tmp_path)
    assert_close(our_logits(load(tmp_path)), their_logits(theirs))


def test_stories260k_gives_the_logits_of_transformers(shared: Path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    directory = shared / "models/stories260k"
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    assert_close(our_logits(load(directory)), their_logits(theirs))


def test_stories260k_continues_token_1_as_recorded(shared: Path):
    text = (shared / "data/README.md").read_text()
    found = re.search(r"From token 1 greedy\s+decoding\s+gives 1 ([\d\s]+)\.", text)
    assert found is not None
    recorded = [int(token) for token in found[1].split()]
    model, params = load(shared / "models/stories260k")
    generate = make_generate(
        model.extend,
        model.empty_cache,
        eos_token=2,
        num_new=len(recorded),
        temperature=0.0,
    )
    tokens = generate(params, *pad_left([[1]], 1, 1), jax.random.key(0))
    assert tokens[0].tolist() == recorded


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Loaded]:
    """A directory written by `write_model`, and what it holds."""
    config = as_decoder_config(
        {"model_type": "llama", "rms_norm_eps": 1e-5, "head_dim": 16} | SIZES
    )
    model = make_model(config, remat="none")
    params = jax.jit(model.init)(jax.random.key(1))
    directory = tmp_path_factory.mktemp("models") / "made"
    write_model(directory, params, as_settings(config), lambda _: None)
    return directory, Loaded(model, params)


@pytest.fixture
def copied(made: tuple[Path, Loaded], tmp_path: Path) -> Path:
    """A copy of the directory, to be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "copied"))


def test_a_written_model_reads_back_bit_for_bit(made: tuple[Path, Loaded]):
    directory, written = made
    read = load(directory)
    assert read.model.config == written.model.config
    assert_same(read.params, written.params)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_a_written_model(tied: bool, tmp_path: Path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    settings = {"model_type": "llama", "tie_word_embeddings": tied, **SIZES}
    config = as_decoder_config(settings)
    model = make_model(config, remat="none")
    ours = Loaded(model, jax.jit(model.init)(jax.random.key(2)))
    write_model(tmp_path / "ours", ours.params, as_settings(config), lambda _: None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_close(our_logits(ours), their_logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    shapes = [
        {
            name: (array.shape, array.dtype)
            for name, array in load_file(tmp_path / who / "model.safetensors").items()
        }
        for who in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1]


def test_a_model_read_from_transformers_is_written_back_with_its_settings(
    tmp_path: Path,
):
    theirs = make_theirs("llama-llama3")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs")
    settings = read_settings(tmp_path / "theirs")
    write_model(tmp_path / "ours", loaded.params, settings, lambda _: None)
    assert read_settings(tmp_path / "ours") == settings
    one, other = (
        load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs")
    )
    assert_same(one, other)


def test_a_model_in_several_files_is_read(tmp_path: Path):
    theirs = make_theirs("llama")
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_same(load(tmp_path / "many").params, load(tmp_path / "one").params)


def test_a_bfloat16_file_is_read_into_float32(
    made: tuple[Path, Loaded], tmp_path: Path
):
    directory, written = made
    low = jax.tree.map(lambda array: array.astype(jnp.bfloat16), written.params)
    settings = read_settings(directory)
    write_model(tmp_path / "low", low, settings, lambda _: None)
    assert read_settings(tmp_path / "low")["dtype"] == "bfloat16"
    read = load(tmp_path / "low").params
    assert {array.dtype.name for array in jax.tree.leaves(read)} == {"float32"}
    assert_same(read, jax.tree.map(lambda array: array.astype(jnp.float32), low))


def test_transformers_bfloat16_file_is_read_into_float32(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    make_theirs("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    assert_close(our_logits(load(tmp_path)), their_logits(theirs))


@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 2, 2)])
def test_a_model_read_onto_a_mesh_equals_one_on_a_single_device(
    made: tuple[Path, Loaded], sizes: tuple[int, int, int]
):
    directory, written = made
    shardings = as_shardings(written.params, make_mesh(*sizes))
    read = load(directory, shardings)
    assert jax.tree.map(lambda array: array.sharding, read.params) == shardings
    assert_same(read.params, written.params)
    if sizes == (2, 2, 1):
        np.testing.assert_allclose(our_logits(read), our_logits(written), atol=1e-5)


def change_tensors(directory: Path, changes: dict[str, np.ndarray | None]) -> None:
    """Replaces, adds or, where None is given, removes tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def test_rotary_tables_and_a_tied_models_copied_output_are_no_surplus(copied: Path):
    before = load(copied).params
    table = np.zeros(8, np.float32)
    change_tensors(copied, {"model.layers.0.self_attn.rotary_emb.inv_freq": table})
    assert_same(load(copied).params, before)
    settings = read_settings(copied) | {"tie_word_embeddings": True}
    (copied / "config.json").write_text(json.dumps(settings))
    after = load(copied).params
    assert after.keys() == before.keys() - {"output"}


def test_a_directory_without_a_config_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a model directory"):
        read_settings(tmp_path)


def test_a_name_that_is_neither_a_directory_nor_on_the_hub_is_refused(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    for name in (str(file), str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=f"no model directory '{name}'"):
            find_model(name)


def test_a_directory_is_found_without_asking_the_hub(made: tuple[Path, Loaded]):
    assert find_model(str(made[0])) == made[0]
