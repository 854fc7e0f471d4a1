"""Memory, open files and compiled programs over a run of 10,000 steps.

Claim: after the warm-up none of them grows.
Command: python experiments/long_run/run.py
Hardware, time and result: README.md beside this file.

The run is `dpojax.run.run` of a tiny model on pairs of ragged length, of which batches
have rows of several shapes; it evaluates, samples and saves every 500 steps and writes
a line every 10. A thread of the same process reads /proc each second.
"""

import argparse
import csv
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dpojax.command_config import InitConfig
from dpojax.commands import init
from dpojax.config import OptimizerConfig, TrainConfig
from dpojax.data.synthetic import make_reviews, make_tokenizer
from dpojax.run import run_to_end
from dpojax.whole_files import write_json_lines

_COMPILED = "/jax/core/compile/backend_compile_duration"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MEBIBYTE = 2**20


class Sample(NamedTuple):
    """What the process holds at one time."""

    seconds: float
    step: float  # of the newest line of metrics.jsonl
    resident_mebibytes: float
    open_files: float
    threads: float
    compiled: float  # programs, since the start


def write_pairs(path: Path, count: int) -> None:
    """Pairs of words of reviews, whose numbers are log-normal."""
    rng = np.random.default_rng(0)
    words = " ".join(make_reviews(count, seed=0)).split(" ")

    def several(median: int) -> str:
        number = int(np.exp(rng.normal(np.log(median), 1.2))) + 1
        start = rng.integers(len(words) - number)
        return " ".join(words[start : start + number])

    write_json_lines(
        path,
        (
            {"prompt": several(20), "chosen": several(8), "rejected": several(8)}
            for _ in range(count)
        ),
    )


def make_config(place: Path, steps: int) -> TrainConfig:
    make_tokenizer().save_pretrained(str(place / "tokenizer"))
    model = init(
        InitConfig(
            output=str(place / "model"),
            tokenizer=str(place / "tokenizer"),
            preset="tiny",
        )
    )
    write_pairs(place / "pairs.jsonl", 1_000)
    return TrainConfig(
        model=str(model),
        data=(str(place / "pairs.jsonl"),),
        output=str(place / "run"),
        test_size=32,
        max_length=192,
        batch_size=4,
        steps=steps,
        log_every=10,
        evaluate_every=500,
        save_every=500,
        sample_prompts=2,
        sample_tokens=4,
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )


def watch(directory: Path, output: Path, ended: threading.Event) -> None:
    """Writes a sample each second."""
    start, compiled = time.monotonic(), [0]

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        compiled[0] += event == _COMPILED

    jax.monitoring.register_event_duration_secs_listener(count)
    with output.open("w", newline="", buffering=1) as file:
        lines = csv.writer(file)
        lines.writerow(Sample._fields)
        while not ended.wait(1.0):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
            lines.writerow(
                Sample(
                    round(time.monotonic() - start, 1),
                    _newest_step(directory / "metrics.jsonl"),
                    round(resident / _MEBIBYTE, 1),
                    len(os.listdir("/proc/self/fd")),
                    threading.active_count(),
                    compiled[0],
                )
            )


def read_samples(path: Path) -> list[Sample]:
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return [Sample(*map(float, row)) for row in rows]


def _newest_step(path: Path) -> int:
    if not path.is_file():
        return 0
    lines = path.read_bytes()[-4096:].splitlines()[-2:]
    steps = [json.loads(line)["step"] for line in lines if line.endswith(b"}")]
    return max(steps, default=0)


def report(samples: list[Sample], warm: int) -> None:
    """What each figure was when warm and at the end, and its slope by least squares."""
    after = [sample for sample in samples if sample.step >= warm]
    head = f"from step {warm} to {after[-1].step:.0f}"
    print(f"| {head} | first | last | most | per 1,000 |")
    print("|---|---|---|---|---|")
    steps = np.array([sample.step for sample in after]) / 1000
    tenth = max(1, len(after) // 10)
    for name in Sample._fields[2:]:
        values = [getattr(sample, name) for sample in after]
        slope = np.polyfit(steps, values, 1)[0]
        first, last = (statistics.median(v) for v in (values[:tenth], values[-tenth:]))
        print(f"| {name} | {first} | {last} | {max(values)} | {slope:+.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--warm", type=int, default=1_500, help="end of the warm-up")
    here = Path(__file__).parent
    parser.add_argument("--output", type=Path, default=here / "samples.csv")
    settings = parser.parse_args()
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as place:
        config = make_config(Path(place), settings.steps)
        arguments = (Path(place, "run"), settings.output, ended)
        watcher = threading.Thread(target=watch, args=arguments)
        watcher.start()
        try:
            run_to_end(config)
        finally:
            ended.set()
            watcher.join()
    report(read_samples(settings.output), settings.warm)


if __name__ == "__main__":
    main()
