"""The README's commands in their order, as they are printed, on little data."""

import gzip
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpojax.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
SECTIONS = "On your own data", "Seeing a run", "Adapters"
# They wait for somebody, or take a package that the tests do without.
NOT_HERE = re.compile(r"dpojax watch|--chat|--track|dpojax sweep")
RECIPE = """
model_name_or_path: runs/sft/final
dataset_name: pairs.jsonl.gz
per_device_train_batch_size: 1
max_length: 256
"""


def commands() -> Iterator[str]:
    for section in SECTIONS:
        text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
        for block in re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S):
            lines = re.findall(r"^dpojax .*", block, re.M)
            yield from (line for line in lines if not NOT_HERE.search(line))


def write_inputs(shared: Path) -> None:
    """What the README's reader has, but less: short pairs, GPT-2's first merges."""
    vocabulary = json.loads((shared / "tokenizers" / "gpt2_encoder.json").read_bytes())
    first = sorted(vocabulary, key=vocabulary.__getitem__)[:2_000] + ["<|endoftext|>"]
    smaller = {token: number for number, token in enumerate(first)}
    Path("gpt2_encoder.json").write_text(json.dumps(smaller), encoding="utf-8")
    merges = (shared / "tokenizers" / "gpt2_vocab.bpe").read_text("utf-8").split("\n")
    kept = "\n".join(merges[: 1 + 2_000 - 256])  # after a line with the version
    Path("gpt2_vocab.bpe").write_text(kept + "\n", encoding="utf-8")
    source = shared / "data" / "hh_harmless_base_test.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    short = [record for record in records if len(json.dumps(record)) < 600]
    with gzip.open("pairs.jsonl.gz", "wt", encoding="utf-8") as pairs:
        pairs.writelines(json.dumps(record) + "\n" for record in short[:80])
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")


@pytest.mark.slow
def test_commands_work_as_printed(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_inputs(shared)
    for command in commands():
        if " hf/reward " in command and not Path("hf/reward").exists():
            made = "--loss bradley_terry --model runs/sft/final --data pairs.jsonl.gz"
            main(["train", *made.split(), "--output", "runs/reward"])
            shutil.copytree("runs/reward/final", "hf/reward")
        main(shlex.split(command, comments=True)[1:])
    for written in ("scored.jsonl", "runs/dpo/report.html", "runs/from-trl/final"):
        assert Path(written).exists()
    for model in ("runs/dpo/final", "hf/dpo", "hf/lora"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
        assert loaded.num_parameters() > 1e6
