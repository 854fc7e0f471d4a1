"""Reading weights: of a file only what a process needs, once, and no copy beside it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config, family_of
from dpojax.models.functional import Params
from dpojax.models.huggingface import read_params, read_settings, write_model
from dpojax.models.weight_files import Index, StoredTensor
from dpojax.models.weight_places import as_places
from dpojax.models.write_weights import as_tensors
from dpojax.sharding import as_shardings, make_mesh

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": TINY | {"num_key_value_heads": 2},
    "phi3": TINY | {"num_key_value_heads": 2},  # fused, one part after another
    "gpt_neox": TINY,  # fused by head
    "gpt2": GPT,  # fused, not transposed
}
# Read in a process of its own, whose memory nothing else has touched.
MEASURE = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.huggingface import read_params, read_settings
from dpojax.sharding import as_shardings, make_mesh

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))

directory, dtype, data, fsdp = sys.argv[1:]
config = as_decoder_config(read_settings(Path(directory)))
like = make_model(config, param_dtype=jnp.dtype(dtype)).params
shardings = as_shardings(like, make_mesh(int(data), int(fsdp)))
before = resident("VmRSS")
params = jax.block_until_ready(read_params(Path(directory), like, shardings))
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print((resident("VmHWM") - before) * 1024 / size)
"""


def as_numbered(like: Params) -> Params:
    """Arrays whose values are all different, and exact in float32."""
    sizes = [leaf.size for leaf in jax.tree.leaves(like)]
    starts = iter(np.cumsum([0, *sizes]))

    def numbered(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        start = int(next(starts))
        values = np.arange(start, start + leaf.size, dtype=np.float32)
        return jnp.asarray(values.reshape(leaf.shape), leaf.dtype)

    return jax.tree.map(numbered, like)


def assert_same(one: Params, other: Params) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_each_value_of_a_file_is_read_once_in_small_pieces(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    sizes: tuple[int, int, int],
):
    settings = {"model_type": family} | FAMILIES[family]
    like = make_model(as_decoder_config(settings)).params
    params = as_numbered(like)
    write_model(tmp_path / "model", params, settings, lambda _: None)
    num_read, read_whole = Counter(), StoredTensor.read

    def read(tensor: StoredTensor, index: Index) -> np.ndarray:
        values = read_whole(tensor, index)
        num_read[tensor.name] += values.size
        largest.append(values.nbytes)
        return values

    largest: list[int] = []
    monkeypatch.setattr(StoredTensor, "read", read)
    monkeypatch.setattr("dpojax.models.read_weights._PIECE", 1000)
    shardings = as_shardings(like, make_mesh(*sizes))
    found = read_params(tmp_path / "model", like, shardings)
    assert jax.tree.map(lambda array: array.sharding, found) == shardings
    assert_same(found, params)
    # Of a tensor that is fused by head, what lies between a part's outputs is read too.
    times = 3 if family == "gpt_neox" else 1
    tensors = as_tensors(like, as_places(like, family_of(settings), 4))
    for name, tensor in tensors.items():
        is_fused = len(tensor.parts) > 1
        most = tensor.num_values * (times if is_fused else 1)
        assert 0 < num_read[name] <= most
    assert max(largest) <= 1000 * times


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 100 MB in bfloat16, a third of it the embedding; two files."""
    directory = tmp_path_factory.mktemp("models") / "large"
    directory.mkdir()
    sizes = {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 2048}
    settings = {"model_type": "llama"} | TINY | sizes
    settings |= {"tie_word_embeddings": True, "num_hidden_layers": 9}
    like = make_model(as_decoder_config(settings)).params
    tensors = as_tensors(like, as_places(like, family_of(settings)))
    files: dict[str, dict[str, np.ndarray]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, (name, tensor) in enumerate(tensors.items()):
        values = np.full(tensor.shape, number, bfloat16)
        files["ab"[number % 2] + ".safetensors"][name] = values
    for file, values in files.items():
        save_file(values, directory / file)
    weight_map = {name: file for file, values in files.items() for name in values}
    index = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's report on a process"
)
@pytest.mark.parametrize(
    ("dtype", "data", "fsdp"), [("float32", 1, 4), ("bfloat16", 4, 1)]
)
def test_reading_takes_little_more_host_memory_than_the_parameters(
    large: Path, dtype: str, data: int, fsdp: int
):
    """On CPU devices, whose arrays are host memory; four that hold the same share it.

    A copy of the embedding or of one stacked array beside them would be 1.3 times, the
    pages of the files 1.5 or 2.
    """
    arguments = str(large), dtype, str(data), str(fsdp)
    measured = subprocess.run(
        (sys.executable, "-c", MEASURE, *arguments),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert 0.9 < float(measured.stdout) < 1.3


def test_a_model_that_another_program_divided_is_read_by_its_index(large: Path):
    like = make_model(as_decoder_config(read_settings(large))).params
    params = read_params(large, like, as_shardings(like, make_mesh()))
    for leaf in jax.tree.leaves(params):
        layers = np.asarray(leaf).reshape(leaf.shape[0], -1)
        assert np.ptp(layers, axis=1).max() == 0 or leaf.ndim == 1
