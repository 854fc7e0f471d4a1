"""Runs of many processes against runs of one: the same command, the same result.

    python experiments/processes/run.py OUTPUT [--processes 1 2 4 8] [--only dpo-full]

Each case trains a tiny model for ten steps in one process with one device, then in one
process with eight devices, then with several processes of one device each, on several
meshes, and compares the weights that they leave. CPUs only. It prints a row for
each, ``| case | processes x devices | mesh | largest difference |``, in absolute terms
and in those of what training changed.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from dpojax.command_config import InitConfig
from dpojax.commands import init
from dpojax.data.labels import label_pairs
from dpojax.data.synthetic import make_reviews, make_tokenizer, split_review

STEPS = 10
_MOST_SECONDS = 900
CASES = {
    "dpo-full": ("--loss", "dpo"),
    "dpo-lora": ("--loss", "dpo", "--lora.rank", "4"),
    "dpo-full-precomputed": ("--loss", "dpo", "--reference", "precomputed"),
    "dpo-lora-precomputed": (
        "--loss", "dpo", "--lora.rank", "4", "--reference", "precomputed",
    ),
    "kto-full": ("--loss", "kto"),
    "kto-lora": ("--loss", "kto", "--lora.rank", "4"),
    "aot-full": ("--loss", "aot"),
    "aot-lora": ("--loss", "aot", "--lora.rank", "4"),
    "aot-full-precomputed": ("--loss", "aot", "--reference", "precomputed"),
}  # fmt: skip
# Of so many processes: data, fsdp and tensor; a single one has eight devices.
MESHES = {
    1: ((8, 1, 1), (2, 2, 2), (1, 4, 2)),
    2: ((2, 1, 1), (1, 2, 1), (1, 1, 2)),
    4: ((2, 2, 1), (1, 2, 2)),
    8: ((2, 2, 2),),
}
FLAGS = (  # most of the time is compilation
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=tuple(MESHES))
    parser.add_argument("--only", nargs="+", choices=CASES, default=tuple(CASES))
    settings = parser.parse_args()
    settings.output.mkdir(parents=True)
    data = make_inputs(settings.output)
    for case in settings.only:
        flags = (*data, *CASES[case])
        alone = settings.output / f"{case}-alone"
        train(flags, alone, num_processes=1, num_devices=1)
        for num_processes, num_devices, mesh in layouts(settings.processes):
            directory = settings.output / f"{case}-{num_processes}x{num_devices}-{mesh}"
            sizes = [
                part
                for name, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
                for part in (f"--mesh.{name}", str(size))
            ]
            train((*flags, *sizes), directory, num_processes, num_devices)
            absolute, relative = difference(directory, alone, settings.output / "model")
            print(
                f"| {case} | {num_processes} x {num_devices} | {mesh} | "
                f"{absolute:.1e} | {relative:.1e} |",
                flush=True,
            )


def layouts(counts: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
    """Processes, devices of each, and the mesh."""
    for count in counts:
        for mesh in MESHES[count]:
            yield count, 8 if count == 1 else 1, mesh


def make_inputs(directory: Path) -> tuple[str, ...]:
    """Writes a tiny model and pairs; returns the flags of a run with them."""
    make_tokenizer().save_pretrained(str(directory / "tokenizer"))
    model = str(directory / "model")
    init(
        InitConfig(output=model, tokenizer=str(directory / "tokenizer"), preset="tiny")
    )
    reviews = [split_review(review) for review in make_reviews(400, seed=0)]
    openings = [opening for opening, _ in reviews[::2]]
    groups = [[a[1], b[1]] for a, b in zip(reviews[::2], reviews[1::2], strict=True)]
    pairs = label_pairs(openings, groups)
    text = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (directory / "pairs.jsonl").write_text(text, encoding="utf-8")
    return (
        "--model", model,
        "--data", str(directory / "pairs.jsonl"),
        "--test-size", "8",
        "--max-length", "96",
        "--batch-size", "16",
        "--steps", str(STEPS),
        "--log-every", "1",
        "--evaluate-every", "5",
        "--save-every", "5",
        "--sample-prompts", "2",
        "--sample-tokens", "4",
        "--optimizer.learning-rate", "1e-3",
    )  # fmt: skip


def train(
    flags: Sequence[str], directory: Path, num_processes: int, num_devices: int
) -> None:
    """Runs ``dpojax train`` in so many processes, and waits for all of them."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(
            (f"--xla_force_host_platform_device_count={num_devices}", *FLAGS)
        ),
        "NPROC": "16",  # more threads than devices that wait for each other
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XDG_CACHE_HOME": str(directory) + "-cache",  # each computes its reference
    }
    command = [sys.executable, "-m", "dpojax", "train", *flags]
    command += ["--output", str(directory)]
    address = f"localhost:{free_port()}"
    processes = []
    for process in range(num_processes):
        more = () if num_processes == 1 else (
            "--distributed", address,
            "--num-processes", str(num_processes),
            "--process", str(process),
        )  # fmt: skip
        log = directory.with_name(f"{directory.name}-{process}.log").open("w")
        with log:
            processes.append(
                subprocess.Popen(
                    (*command, *more), env=environment, stdout=log, stderr=log
                )
            )
    codes = [process.wait(_MOST_SECONDS) for process in processes]
    if any(codes):
        raise RuntimeError(f"{directory}: exit codes {codes}; see its logs.")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def difference(directory: Path, alone: Path, model: Path) -> tuple[float, float]:
    """The largest of any weight; and relative to the largest change by training."""
    found, wanted, start = (weights(place) for place in (
        directory / "final", alone / "final", model
    ))  # fmt: skip
    most = max(np.abs(found[name] - wanted[name]).max() for name in wanted)
    moved = max(
        np.abs(wanted[name] - start.get(name, np.float32(0))).max() for name in wanted
    )
    return float(most), float(most / moved)


def weights(directory: Path) -> dict[str, np.ndarray]:
    """What a model's directory or that of adapters holds."""
    (path,) = directory.glob("*.safetensors")
    return load_file(path)


if __name__ == "__main__":
    main()
