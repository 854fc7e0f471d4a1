"""Preparing a million pairs: how fast, in how much memory, and the second start.

Claim: a million pairs of 112 positions go from JSON Lines to the last batch of an epoch
at 5,000 a second or more on two cores, in less than 4 GiB; the second time in seconds.
Command: python experiments/load/make_pairs.py pairs.jsonl --tokenizer TOKENIZER
         python experiments/load/run.py pairs.jsonl --tokenizer TOKENIZER
Hardware, time and result: README.md beside this file; the command prints its table.

Two starts, each a process of its own, with a cache that is empty at the first. A start
prepares the training and the test split as `dpojax train` does, takes the fingerprint
for a checkpoint's note, and goes through all batches of an epoch: the order, the rows
and their layout. The peak is that of the process (Linux's VmHWM), Python, JAX and
mapped files included. Then, in the same run and for comparing machines: what the
tokenizers library alone takes on a sample of the texts, and the speed of NumPy's
matrix products.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from dpojax.config import TrainConfig
from dpojax.data.loader import counted_batches, fingerprint
from dpojax.data.packing import row_lengths
from dpojax.data.tokenize import load_tokenizer
from dpojax.examples import load_split
from dpojax.prepare import make_configured_loss

BATCH_SIZE = 64
SAMPLE, TOGETHER = 20_000, 1_024  # pairs
MATRIX, TIMES = 2_048, 5


def measure(data: str, tokenizer_name: str, end_of_sequence: str) -> dict[str, Any]:
    config = TrainConfig(model="none", data=(data,), max_length=1024)
    loss = make_configured_loss(config.loss)
    tokenizer = load_tokenizer(tokenizer_name, end_of_sequence)
    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start, used = time.perf_counter(), time.process_time()
        result = call()
        seconds[name] = round(time.perf_counter() - start, 2)
        processor[name] = round(time.process_time() - used, 2)
        print(f"{name}: {seconds[name]} s", file=sys.stderr)
        return result

    train = timed("train", lambda: load_split(config, loss, tokenizer, "train"))
    test = timed("test", lambda: load_split(config, loss, tokenizer, "test"))
    print_of = timed("fingerprint", lambda: fingerprint(train))
    lengths = timed("lengths", lambda: row_lengths(train))
    num_steps = -(-len(train) // BATCH_SIZE)
    settings: dict[str, Any] = {
        "batch_size": BATCH_SIZE, "num_seen": len(train), "seed": 0, "start": 0
    }  # fmt: skip

    def count_positions() -> int:
        batches = counted_batches(train, stop=num_steps, **settings)
        return sum(batch.tokens.size for _, batch in batches)

    timed("first batch", lambda: next(counted_batches(train, stop=1, **settings)))
    positions = timed("epoch", count_positions)
    return {
        "pairs": len(train) + len(test),
        "fingerprint": print_of,
        "positions": float(lengths.mean()),
        "filled": float(lengths.sum() / positions),
        "seconds": seconds,
        "processor": processor,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def start(arguments: list[str], cache: str) -> dict[str, Any]:
    """Measures in a new process."""
    command = [sys.executable, __file__, *arguments, "--one"]
    environment = os.environ | {"XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}
    begun = time.perf_counter()
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    whole = round(time.perf_counter() - begun, 2)
    return json.loads(done.stdout.splitlines()[-1]) | {"whole": whole}


def report(name: str, figures: dict[str, Any]) -> str:
    seconds, processor = figures["seconds"], figures["processor"]
    busy = sum(seconds.values())
    cells = [
        name,
        f"{seconds['train'] + seconds['test']:.1f}",
        f"{seconds['first batch']:.1f}",
        f"{seconds['epoch']:.1f}",
        f"{figures['pairs'] / busy:,.0f}",
        f"{sum(processor.values()) / figures['pairs'] * 1e6:.0f}",
        f"{figures['peak'] / 2**30:.2f}",
        f"{figures['whole']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def measure_library(data: Path, tokenizer_name: str, end_of_sequence: str) -> str:
    """How fast the tokenizers library alone is on the texts of the first pairs."""
    tokenizer = load_tokenizer(tokenizer_name, end_of_sequence)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    backend = tokenizer.backend_tokenizer
    with data.open(encoding="utf-8") as file:
        pairs = [json.loads(line) for line in islice(file, SAMPLE)]
    windows = [pairs[at : at + TOGETHER] for at in range(0, len(pairs), TOGETHER)]
    start, used = time.perf_counter(), time.process_time()
    for window in windows:
        texts = [pair[name] for pair in window for name in pair]
        backend.encode_batch_fast(texts, add_special_tokens=False)
    wall, processor = time.perf_counter() - start, time.process_time() - used
    return (
        f"The tokenizers library alone, on {len(pairs):,} of these pairs: "
        f"{len(pairs) / wall:,.0f} pairs/s, "
        f"{processor / len(pairs) * 1e6:.0f} µs of processors a pair"
    )


def measure_products() -> str:
    """The speed of NumPy's products of float32 matrices, the best of a few."""
    matrix = np.ones((MATRIX, MATRIX), np.float32)
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        np.matmul(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return f"Matrix products: {2 * MATRIX**3 / min(seconds) / 1e9:.0f} GFLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--eos-token", default="<|endoftext|>")
    parser.add_argument("--one", action="store_true", help="one start, in this process")
    settings = parser.parse_args()
    if settings.one:
        figures = measure(str(settings.data), settings.tokenizer, settings.eos_token)
        print(json.dumps(figures))
        sys.stdout.flush()
        os._exit(0)  # Grain's threads wait for nothing
    given = [str(settings.data), "--tokenizer", settings.tokenizer]
    given += ["--eos-token", settings.eos_token]
    print("| start | preparing, s | first batch, s | epoch, s | pairs/s | ", end="")
    print("µs of processors a pair | peak, GiB | process, s |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=settings.data.parent) as cache:
        starts = {name: start(given, cache) for name in ("first", "second")}
        for name, figures in starts.items():
            print(report(name, figures))
    first, second = starts.values()
    assert first["fingerprint"] == second["fingerprint"]
    print(
        f"{first['pairs']:,} pairs of {first['positions']:.0f} positions on average, "
        f"{first['filled']:.1%} of the batches' positions filled"
    )
    print(measure_library(settings.data, settings.tokenizer, settings.eos_token))
    print(measure_products())


if __name__ == "__main__":
    main()
