"""dpojax, TRL and Tunix in turn on the same weights, pairs and cores.

Claim, hardware, time and result: NOTES.md beside this file.
Command: see README.md; for one case on random pairs
  python experiments/benchmarks/compare.py fixed-4x256 --output DIRECTORY \
    --trl-python VENV/bin/python --tunix-python OTHER/bin/python

Each measurement is a process of its own, with its own interpreter; rounds go A B C A B
C, so that what changes on the machine meets all alike. What is there already is not
measured again. The losses of all steps must agree, or the table says so and the exit
status is 1.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

HERE = Path(__file__).parent
TOLERANCE = 1e-3  # of losses in float32


class Case(NamedTuple):
    """What is prepared, as flags of prepare.py, and how large a batch is."""

    flags: Sequence[str]
    batch_size: int = 8
    is_text: bool = False  # needs --data and --tokenizer


# The smallest multiple of 128 that holds GPT-2's 50,257 tokens.
_GPT2 = "--shape.vocabulary", "50304"
CASES: Mapping[str, Case] = {
    "text-4x256": Case(("--shape", "4x256", *_GPT2), is_text=True),
    "text-8x512": Case(("--shape", "8x512", *_GPT2), is_text=True),
    "fixed-4x256": Case(("--shape", "4x256")),
    "fixed-8x512": Case(
        ("--shape", "8x512", "--prompt-tokens", "128", "--completion-tokens", "128"), 4
    ),
    "spread-4x256": Case(("--shape", "4x256", "--spread", "0.6")),
    "vocabulary-32000": Case(("--shape", "4x256", "--shape.vocabulary", "32000")),
    "qwen2.5-0.5b": Case(
        ("--shape", "qwen2.5-0.5b", "--prompt-tokens", "1024",
         "--completion-tokens", "512", "--spread", "0.6"), 16,
    ),
    "llama-3.2-1b": Case(
        ("--shape", "llama-3.2-1b", "--prompt-tokens", "1024",
         "--completion-tokens", "512", "--spread", "0.6"), 16,
    ),
    "smoke": Case(
        ("--shape", "4x256", "--shape.layers", "2", "--shape.width", "32",
         "--shape.heads", "2", "--shape.mlp-width", "64", "--shape.vocabulary", "600",
         "--prompt-tokens", "20", "--completion-tokens", "12", "--spread", "0.5"), 4,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is compared."""

    cases: tyro.conf.Positional[tuple[str, ...]]
    """Names of cases."""
    output: Path
    """Directory of inputs, measurements and tables; goes on where it was stopped."""
    trl_python: str | None = None
    """Interpreter that has torch and trl; without it TRL is left out."""
    tunix_python: str | None = None
    """Interpreter that has google-tunix; without it Tunix is left out."""
    data: str | None = None
    """Preferences as text, for the cases that need them."""
    tokenizer: str | None = None
    """Tokenizer for these."""
    max_length: int = 512
    """Most tokens of a prompt and one completion of text."""
    rounds: int = 3
    steps: int = 10
    unmeasured_steps: int = 4
    learning_rate: float = 1e-3
    threads: int = 2
    """Cores that every process may use."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; weights are float32."""
    attention: str = "sdpa"
    """TRL's attention."""
    variants: tuple[str, ...] = ("dpojax=",)
    """Names of dpojax's contenders and their flags, as: "dpojax=--no-remat"."""
    trl_variants: tuple[str, ...] = ("trl=", "trl precomputed=--precompute")
    """The same of TRL, flags of trl_side.py."""


def main(arguments: Arguments) -> None:
    """Prepares, measures and prints the tables of all cases."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    for name in arguments.cases:
        if name not in CASES:
            raise SystemExit(f"There is no case {name}; there are {', '.join(CASES)}.")
    agree = [compare(arguments, name, CASES[name]) for name in arguments.cases]
    sys.exit(0 if all(agree) else 1)


def compare(arguments: Arguments, name: str, case: Case) -> bool:
    """Measures one case, writes its table; says whether the losses agree."""
    place = arguments.output / name
    prepare(arguments, case, place / "inputs")
    commands = contenders(arguments, case, place / "inputs")
    for number in range(arguments.rounds):
        for contender, command in commands.items():
            output = place / f"{number}-{contender.replace(' ', '-')}.json"
            if not output.exists():
                print(f"{name}, round {number + 1}: {contender}", flush=True)
                run([*command, "--output", str(output)], arguments.device)
    measured = {
        contender: [
            json.loads(
                (place / f"{number}-{contender.replace(' ', '-')}.json").read_text()
            )
            for number in range(arguments.rounds)
        ]
        for contender in commands
    }
    rows = summarize(measured)
    text = "\n".join([*left_out(arguments), as_table(name, rows)])
    (place / "table.md").write_text(text + "\n", encoding="utf-8")
    (place / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)
    tolerance = TOLERANCE if arguments.dtype == "float32" else 10 * TOLERANCE
    return all(row["largest_difference_of_losses"] <= tolerance for row in rows)


def prepare(arguments: Arguments, case: Case, place: Path) -> None:
    """Writes a case's inputs, once; on the host, whatever is measured on."""
    if (place / "batches.jsonl").exists():
        return
    flags = [*case.flags, "--batch-size", str(case.batch_size)]
    flags += ["--steps", str(arguments.steps + arguments.unmeasured_steps)]
    if case.is_text:
        if arguments.data is None or arguments.tokenizer is None:
            raise SystemExit("Cases of text need --data and --tokenizer.")
        flags += ["--data", arguments.data, "--tokenizer", arguments.tokenizer]
        flags += ["--max-length", str(arguments.max_length)]
    command = [sys.executable, str(HERE / "prepare.py"), "--output", str(place)]
    run(command + flags, "cpu")


def contenders(arguments: Arguments, case: Case, inputs: Path) -> dict[str, list[str]]:
    """Commands by name, dpojax's first; each lacks its --output."""
    steps = ["--batch-size", str(case.batch_size), "--steps", str(arguments.steps)]
    steps += ["--unmeasured-steps", str(arguments.unmeasured_steps)]
    rate = str(arguments.learning_rate)
    own = [sys.executable, "-m", "dpojax", "bench", *steps]
    own += ["--model", str(inputs / "model"), "--compute-dtype", arguments.dtype]
    own += ["--token-file", str(inputs / "examples.jsonl")]
    own += ["--optimizer.schedule", "constant", "--optimizer.warmup-steps", "0"]
    own += ["--optimizer.learning-rate", rate]
    theirs = ["--directory", str(inputs), *steps, "--learning-rate", rate]
    theirs += ["--dtype", arguments.dtype]
    found = {name: own + flags for name, flags in variants(arguments.variants)}
    if arguments.trl_python is not None:
        trl = [arguments.trl_python, str(HERE / "trl_side.py"), *theirs]
        trl += ["--threads", str(arguments.threads), "--device", arguments.device]
        trl += ["--attention", arguments.attention]
        found |= {name: trl + flags for name, flags in variants(arguments.trl_variants)}
    if arguments.tunix_python is not None and is_llama(inputs):
        script = str(HERE / "tunix_side.py")
        found["tunix"] = [arguments.tunix_python, script, *theirs]
    return found


def variants(texts: Sequence[str]) -> list[tuple[str, list[str]]]:
    parts = [text.partition("=") for text in texts]
    return [(name, flags.split()) for name, _, flags in parts]


def is_llama(inputs: Path) -> bool:
    settings = json.loads((inputs / "model" / "config.json").read_text())
    return settings["model_type"] == "llama"


def left_out(arguments: Arguments) -> list[str]:
    """A line for each peer that has no interpreter."""
    given = {"TRL": arguments.trl_python, "Tunix": arguments.tunix_python}
    return [
        f"{name} is left out: no interpreter was given for it.\n"
        for name, python in given.items()
        if python is None
    ]


def run(command: Sequence[str], device: str) -> None:
    """Runs a process; what it says is shown only if it fails.

    Nobody's first step finds its programs compiled.
    """
    alike = {"HF_HUB_OFFLINE": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment = os.environ | alike
    if device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def summarize(measured: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each contender: medians over rounds, and ratios to the first."""
    first = next(iter(measured.values()))
    rows = []
    for name, runs in measured.items():
        ratios = [speed(a) / speed(b) for a, b in zip(first, runs, strict=True)]
        rows.append(
            {
                "contender": name,
                "library": runs[0]["library"],
                "step_seconds": statistics.median(
                    statistics.median(run["seconds"]) for run in runs
                ),
                "tokens_per_second": statistics.median(map(speed, runs)),
                "first_is_faster_by": statistics.median(ratios),
                "from": min(ratios),
                "to": max(ratios),
                "host_peak_bytes": max(run["host_peak_bytes"] for run in runs),
                "device_peak_bytes": runs[0]["device_peak_bytes"],
                "first_step_seconds": statistics.median(
                    run["first_step_seconds"] for run in runs
                ),
                "largest_difference_of_losses": max(
                    difference(a, b) for a, b in zip(first, runs, strict=True)
                ),
            }
        )
    return rows


def speed(run: Mapping[str, Any]) -> float:
    """Tokens of all sequences a second, over the measured steps."""
    return sum(run["sequence_tokens"]) / sum(run["seconds"])


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest difference of two runs' losses of the same step."""
    pairs = zip(one["losses"], other["losses"], strict=True)
    return max(abs(a - b) for a, b in pairs)


def as_table(case: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    name = rows[0]["contender"]
    lines = [
        f"### {case}\n",
        f"| | s/step | tokens/s | {name} is faster by | spread | host peak, MB "
        "| device peak, MB | first step, s | losses differ by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        device = row["device_peak_bytes"]
        lines.append(
            f"| {row['contender']} | {row['step_seconds']:.3f} "
            f"| {row['tokens_per_second']:,.0f} | {row['first_is_faster_by']:.2f} "
            f"| {row['from']:.2f} to {row['to']:.2f} "
            f"| {row['host_peak_bytes'] / 1e6:,.0f} "
            f"| {'' if device is None else f'{device / 1e6:,.0f}'} "
            f"| {row['first_step_seconds']:.1f} "
            f"| {row['largest_difference_of_losses']:.0e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
