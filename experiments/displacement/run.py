"""Likelihood displacement: DPO makes chosen answers less likely where pairs resemble.

Claim: on sentences of BLiMP that differ from their rejected ones in one word, the
chosen log-ratio falls by many nats under dpo, and by less than one under dpop and
dpo+sft.
Command: python experiments/displacement/run.py --output runs/displacement
Hardware, time and result: README.md beside this file; plot.py makes its figure.

The same command continues where it was stopped.
"""

import gzip
import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpojax.compilation_cache import use_compilation_cache
from dpojax.config import LossConfig, OptimizerConfig, TrainConfig
from dpojax.models.decoder import DecoderConfig, make_model
from dpojax.models.families import as_settings
from dpojax.models.huggingface import write_model
from dpojax.run import run_to_end
from dpojax.whole_files import whole_directory, write_json_lines

BLIMP = Path(os.environ.get("DPOJAX_SHARED", "../shared"), "data/blimp_pairs.jsonl.gz")
NUM_PAIRS = 6_000
LOSSES = {
    "dpo": LossConfig(name="dpo", beta=0.1),
    "dpop": LossConfig(name="dpop", beta=0.1),
    "dpo+sft": LossConfig(name="dpo+sft", beta=0.1),
}
KEPT = ("logratios/chosen", "logratios/rejected", "rewards/accuracies")


def main(output: Path, seeds: int = 3) -> None:
    """Runs what is not done yet; curves.jsonl has a line for each evaluation.

    Args:
      output: directory of the runs.
      seeds: each loss is run with seeds 0, 1, ...
    """
    use_compilation_cache()
    sft = output / "sft"
    if not (sft / "final").exists():
        shutil.rmtree(output, ignore_errors=True)
        pairs = similar_pairs(NUM_PAIRS)
        write_json_lines(output / "pairs.jsonl", pairs)
        texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
        write_new_model(output / "new", texts)
        # Both sentences of a pair, so that the reference has no preference yet.
        rows = ({"prompt": "", "completion": text} for text in texts)
        write_json_lines(output / "sentences.jsonl", rows)
        run_to_end(imitation(output))
    for seed in range(seeds):
        for name in LOSSES:
            place = output / f"{name}-{seed}"
            if not (place / "final").exists():
                shutil.rmtree(place, ignore_errors=True)
                run_to_end(alignment(output, name, seed))
    write_json_lines(output / "curves.jsonl", curves(output, seeds))


def similar_pairs(number: int) -> list[dict[str, str]]:
    """Minimal pairs of BLiMP that differ in exactly one word."""
    with gzip.open(BLIMP, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    similar = [
        row for row in rows if num_differing(row["chosen"], row["rejected"]) == 1
    ]
    return [
        {"prompt": "", "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in random.Random(0).sample(similar, number)
    ]


def num_differing(one: str, other: str) -> int | None:
    """In how many words two sentences differ; None: their lengths do."""
    pair = one.split(), other.split()
    if len(pair[0]) != len(pair[1]):
        return None
    return sum(a != b for a, b in zip(*pair, strict=True))


def write_new_model(directory: Path, texts: Iterable[str]) -> None:
    """An untrained decoder whose tokens are the words of the texts."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(("<bos>", "<eos>", *words))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>"
    )
    shape = DecoderConfig(
        vocabulary_size=-(-len(vocabulary) // 128) * 128,
        width=64,
        num_layers=2,
        num_heads=2,
        num_key_heads=2,
        head_dimension=32,
        mlp_width=192,
        tied_output=True,
        max_length=64,
    )
    params = jax.jit(make_model(shape).init)(jax.random.key(0))
    with whole_directory(directory) as place:
        write_model(place, params, as_settings(shape), tokenizer.save_pretrained)


def imitation(output: Path) -> TrainConfig:
    """SFT on the sentences."""
    return TrainConfig(
        loss=LossConfig(name="sft"),
        model=str(output / "new"),
        data=(str(output / "sentences.jsonl"),),
        output=str(output / "sft"),
        max_length=48,
        batch_size=32,
        sample_prompts=0,
        log_every=100,
        evaluate_every=1_000,
        save_every=1_000,
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine"),
    )


def alignment(output: Path, name: str, seed: int) -> TrainConfig:
    """A hundred steps of a loss, evaluated often; all losses have the same rate."""
    return TrainConfig(
        loss=LOSSES[name],
        model=str(output / "sft" / "final"),
        data=(str(output / "pairs.jsonl"),),
        output=str(output / f"{name}-{seed}"),
        seed=seed,
        test_size=256,
        max_length=48,
        batch_size=32,
        steps=100,
        sample_prompts=0,
        evaluate_every=10,
        save_every=1_000,
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="constant"),
    )


def curves(output: Path, seeds: int) -> list[dict[str, Any]]:
    """What every run measured on its held-out pairs, step by step."""
    rows = []
    for name in LOSSES:
        for seed in range(seeds):
            text = (output / f"{name}-{seed}" / "metrics.jsonl").read_text("utf-8")
            lines = [json.loads(line) for line in text.splitlines()]
            rows += [
                {"loss": name, "seed": seed, "step": line["step"]}
                | {key: line[key] for key in KEPT}
                for line in lines
                if line["split"] == "test"
            ]
    return rows


if __name__ == "__main__":
    tyro.cli(main)
