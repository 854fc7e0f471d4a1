"""Weak scaling of a DPO step by the TPU compiler: rows per chip stay, chips grow.

    pip install 'dpojax[plan]'
    python experiments/scaling/run.py --model qwen2.5-0.5b --output experiments/scaling

compiles the step of `dpojax plan` for each slice and writes a table and the plans. All
parameters are shared by all chips, or with `--fsdp N` by N, with copies of these. What
theory says of the interconnect: of n chips that share a copy each sends (n - 1) / n of
what it gathers and scatters: layers' matrices in bfloat16, gathered for the policy, for
the reference and for the backward pass, their gradients once; of the embedding
likewise, its gradient in float32. With k copies it then sends 2 (k - 1) / k of its
share of the gradients.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from dpojax.bench_inputs import shape_settings
from dpojax.command_config import PlanConfig, ShapeConfig
from dpojax.config import MeshConfig
from dpojax.planning.chips import read_slice
from dpojax.planning.command import plan

SLICES = ("v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16")


def main() -> None:
    parser = argparse.ArgumentParser(description="Weak scaling by the compiler.")
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--rows-per-chip", type=int, default=2)
    parser.add_argument("--fsdp", type=int, help="chips that share a copy; all")
    parser.add_argument("--slices", nargs="+", default=SLICES)
    parser.add_argument("--output", type=Path, default=Path("experiments/scaling"))
    args = parser.parse_args()
    shared = "" if args.fsdp is None else f"-fsdp-{args.fsdp}"
    file = args.output / f"{args.model}{shared}.jsonl"
    plans = []
    for name in args.slices:
        chips = read_slice(name).num_chips
        config = PlanConfig(
            shape=ShapeConfig(name=args.model),
            topology=name,
            prompt_tokens=1024,
            completion_tokens=512,  # a pair fills a row of 2,048
            batch_size=args.rows_per_chip * chips,
            mesh=MeshConfig(data=-1, fsdp=args.fsdp or chips),
        )
        plans.append(plan(config))
        file.write_text("".join(json.dumps(one) + "\n" for one in plans), "utf-8")
    print(table(plans))


def table(plans: list[dict[str, Any]]) -> str:
    """Markdown; a column's figures over those of the first slice in brackets."""
    head = (
        "| slice | TFLOP a chip | temporaries, MiB | sent a chip, GB | by theory, GB | "
        "sent by collective, GB | roofline, s | bound |"
    )
    lines = [head, "|---" * 8 + "|"]
    first = plans[0]
    for one in plans:
        kinds = one["interconnect"].items()
        cells = [
            one["topology"],
            _relative(one, first, _flops, 1e12),
            _relative(one, first, _temporaries, 2**20),
            _relative(one, first, sent, 1e9),
            _relative(one, first, theory, 1e9),
            ", ".join(f"{kind} {found['bytes'] / 1e9:.2f}" for kind, found in kinds),
            f"{one['roofline']['seconds']:.3f}",
            one["roofline"]["bound"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sent(figures: dict[str, Any]) -> float:
    """Bytes that a chip sends, whatever the collective."""
    return sum(one["bytes"] for one in figures["interconnect"].values())


def theory(figures: dict[str, Any]) -> float:
    """Bytes that a chip must send."""
    settings = shape_settings(ShapeConfig(name=figures["model"]))
    embedding = settings["vocab_size"] * settings["hidden_size"]
    matrices = 2 if not settings.get("tie_word_embeddings") else 1
    layers = figures["parameters"] - matrices * embedding
    whole = 4 * 2 * layers + (3 * 2 + 4) * embedding
    gradients = 2 * layers + 4 * embedding
    shared = figures["mesh"]["fsdp"]
    copies = figures["chips"] // shared
    return whole * (1 - 1 / shared) + gradients / shared * 2 * (1 - 1 / copies)


def _flops(figures: dict[str, Any]) -> float:
    return figures["flops"]["per_chip"]


def _temporaries(figures: dict[str, Any]) -> float:
    return figures["memory"]["temporaries_bytes"]


def _relative(one: Any, first: Any, figure: Any, unit: float) -> str:
    return f"{figure(one) / unit:,.1f} ({figure(one) / figure(first):.3f})"


if __name__ == "__main__":
    main()
