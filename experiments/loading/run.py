"""Host memory that reading and writing a model directory takes, at its peak.

Claim: reading takes a few megabytes beside the parameters themselves; on one CPU
process, whose arrays live on the host, the peak stays below 1.3 times their size.
Writing takes the size of one file of weights.
Command: python experiments/loading/run.py
Hardware, time and result: README.md beside this file; the command prints its table.

A random checkpoint of the shape of Llama 3.2 1B is made from a seed, file by file, and
removed afterwards. Each measurement is a process of its own: the peak of its resident
memory (Linux's VmHWM) less what it had before reading. Pages of open files count.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tyro
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config, family_of
from dpojax.models.huggingface import read_params, read_settings, write_model
from dpojax.models.weight_places import as_places
from dpojax.models.write_weights import as_tensors

SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
NUM_FILES = 8
SHARD = "1GB"  # files that are written


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure; without arguments everything."""

    directory: str | None = None  # of a checkpoint; None: made, and removed
    dtype: Literal["float32", "bfloat16"] | None = None  # None: each in a new process


class Figures(NamedTuple):
    """What reading and then writing took, in bytes and seconds."""

    size: int  # of the parameters
    peak: int  # of host memory while reading, above what there was before
    writing_peak: int  # the same while writing, parameters included
    seconds: float  # of reading
    writing_seconds: float


def main(arguments: Arguments) -> None:
    """Makes what is missing and measures."""
    if arguments.directory is None:
        with tempfile.TemporaryDirectory() as name:
            make_checkpoint(Path(name), seed=0)
            show(name)
    elif arguments.dtype is None:
        show(arguments.directory)
    else:
        print(json.dumps(measure(Path(arguments.directory), arguments.dtype)))


def show(directory: str) -> None:
    """Prints a row of figures for each dtype."""
    print(
        "| parameters in | they take, GB | reading: peak, GB | ratio | seconds "
        "| writing: peak, GB | above them, GB | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        again = sys.executable, __file__, "--directory", directory, "--dtype", dtype
        done = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True)
        found = Figures(*json.loads(done.stdout))
        size, peak = found.size, found.writing_peak
        print(
            f"| {dtype} | {size / 1e9:.2f} | {found.peak / 1e9:.2f} "
            f"| {found.peak / size:.3f} | {found.seconds:.0f} "
            f"| {peak / 1e9:.2f} | {(peak - size) / 1e9:.2f} "
            f"| {found.writing_seconds:.0f} |"
        )


def make_checkpoint(directory: Path, seed: int) -> None:
    """Writes random bfloat16 weights and an index, holding one file's at a time."""
    shape = as_decoder_config(SETTINGS)
    params = make_model(shape, param_dtype=jnp.bfloat16).params
    tensors = as_tensors(params, as_places(params, family_of(SETTINGS)))
    total = sum(tensor.num_bytes for tensor in tensors.values())
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=total // NUM_FILES,
    )
    random = np.random.default_rng(seed)
    for file, names in split.filename_to_tensors.items():
        values = {
            name: random.standard_normal(tensors[name].shape, np.float32).astype(
                ml_dtypes.bfloat16
            )
            for name in names
        }
        save_file(values, directory / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(SETTINGS))


def measure(directory: Path, dtype: str) -> Figures:
    """Reads the checkpoint onto one device of this process, and writes it."""
    settings = read_settings(directory)
    model = make_model(as_decoder_config(settings), param_dtype=jnp.dtype(dtype))
    device = SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, model.params)
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    params = jax.block_until_ready(read_params(directory, model.params, shardings))
    middle, peak = time.perf_counter(), resident_bytes("VmHWM") - before
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "model"
        write_model(output, params, settings, lambda _: None, max_shard_size=SHARD)
    return Figures(
        sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        peak,
        resident_bytes("VmHWM") - before,
        middle - start,
        time.perf_counter() - middle,
    )


def resident_bytes(which: str) -> int:
    """A line of Linux's report on this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(which))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
