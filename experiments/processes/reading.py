"""How often several processes read each byte of a model's file.

    python experiments/processes/reading.py OUTPUT [--processes 4]

Writes a random Llama of 31 million parameters, reads it onto a mesh of so many
processes, their parameters divided among them, and adds up what each of them took from
the file. Expected: 1, and a little, since every device has the norms whole.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import jax
import numpy as np

from dpojax.config import DistributedConfig
from dpojax.connecting import connect
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.huggingface import read_params, read_settings, write_model
from dpojax.models.weight_files import Index, StoredTensor
from dpojax.sharding import as_shardings, make_mesh

SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16_384,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1024,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--read-as", type=int, help="one of the processes")
    parser.add_argument("--address")
    settings = parser.parse_args()
    if settings.read_as is not None:
        read(settings.output, settings.address, settings.processes, settings.read_as)
        return
    params = jax.jit(make_model(as_decoder_config(SETTINGS)).init)(jax.random.key(0))
    write_model(settings.output, params, SETTINGS, lambda _: None)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    command = [sys.executable, __file__, str(settings.output)]
    command += ["--processes", str(settings.processes), "--address", "localhost:43217"]
    started = [
        subprocess.Popen(
            [*command, "--read-as", str(process)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(settings.processes)
    ]
    said = [process.communicate()[0] for process in started]
    counts = [int(re.findall(r"^read (\d+)$", text, re.MULTILINE)[0]) for text in said]
    shares = ", ".join(f"{count / size:.4f}" for count in counts)
    print(f"{size:,} bytes; read by each {shares}; by all {sum(counts) / size:.4f}")


def read(directory: Path, address: str, num_processes: int, process: int) -> None:
    """Reads this process's part, and counts the bytes."""
    connect(
        DistributedConfig(method=address, num_processes=num_processes, process=process)
    )
    whole, sizes = StoredTensor.read, []

    def counted(self: StoredTensor, index: Index) -> np.ndarray:
        values = whole(self, index)
        sizes.append(values.nbytes)
        return values

    like = make_model(as_decoder_config(read_settings(directory))).params
    with patch.object(StoredTensor, "read", counted):
        read_params(directory, like, as_shardings(like, make_mesh(1, -1)))
    print(f"\nread {sum(sizes)}", flush=True)


if __name__ == "__main__":
    main()
