"""Two processes read and write one model, each holding a half, and use it as one."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax

from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.huggingface import write_model

SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
PROCESS = """
import sys
from pathlib import Path
import jax
import numpy as np
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.huggingface import read_params, read_settings, write_model
from dpojax.models.weight_files import StoredTensor
from dpojax.data.packing import Example
from dpojax.reference_cache import find_cache
from dpojax.reference_pass import make_reference_step, with_reference
from dpojax.sharding import as_shardings, make_mesh, make_placement

directory, port, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, process)
read, sizes = StoredTensor.read, []

def counted(tensor, index):
    values = read(tensor, index)
    sizes.append(values.nbytes)
    return values

StoredTensor.read = counted
settings = read_settings(directory / "model")
like = make_model(as_decoder_config(settings)).params
shardings = as_shardings(like, make_mesh(1, 4))
params = read_params(directory / "model", like, shardings)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
tokenizer = lambda path: (path / "tokenizer.json").write_text(str(process))
write_model(directory / "again", params, settings, tokenizer, max_shard_size=50_000)
written = sorted(path.name for path in (directory / "again").iterdir())

# Each has a cache of its own, and process 0 alone uses one.
model = make_model(as_decoder_config(settings))
mesh = make_mesh(1, 4)
rng = np.random.default_rng(0)
some = [rng.integers(1, 96, n).astype(np.int32) for n in range(3, 12)]
examples = [Example(some[0], (one, one[:2])) for one in some]
for _ in range(2):
    found = with_reference(
        examples,
        make_reference_step(model.apply, mesh),
        lambda: params,
        find_cache(directory / f"kept{process}", {}),
        batch_size=4,
        placement=make_placement(mesh),
    )
print("sums", sum(sum(one.reference) for one in found), flush=True)
print("read", sum(sizes) / size, len(written), flush=True)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_two_processes_read_a_half_each_and_write_the_whole(tmp_path: Path):
    params = jax.jit(make_model(as_decoder_config(SETTINGS)).init)(jax.random.key(0))
    for name in ("model", "wanted"):
        write_model(
            tmp_path / name,
            params,
            SETTINGS,
            lambda path: (path / "tokenizer.json").write_text("0"),
            max_shard_size=50_000,
        )
    devices = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
    port = str(free_port())
    processes = [
        subprocess.Popen(
            (sys.executable, "-c", PROCESS, str(tmp_path), port, str(process)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in (0, 1)
    ]
    files = {path.name: path.read_bytes() for path in (tmp_path / "wanted").iterdir()}
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # where one fails, the other waits for it
    sums = [re.search(r"^sums (-\S+)$", text, re.MULTILINE) for text in said]
    for process, text in zip(processes, said, strict=True):
        figures = re.search(r"^read (\S+) (\d+)$", text, re.MULTILINE)
        assert process.returncode == 0 and figures is not None, text
        assert 0.5 <= float(figures[1]) < 0.51  # norms are on every device
        assert int(figures[2]) == len(files)  # seen by both after writing
    assert len({found[1] for found in sums if found is not None}) == 1
    assert "9 examples reused, 0 to compute" in said[1]
    assert [path.name for path in tmp_path.glob("kept*")] == ["kept0"]
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again == files
