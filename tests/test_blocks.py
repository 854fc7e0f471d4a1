"""The shell blocks of README and documentation, run as they stand, one after the other.

Only smaller: a tiny model, twenty pairs, two steps. What is not run says why.
"""

import gzip
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_docs import TEXTS

from dpojax.cli import main

# How lines begin that are not run, and why; the first that fits counts.
NOT_RUN = {
    "pip install": "continuous integration does, on a clean checkout",
    "dpojax train --output runs/first": "the embedded task, minutes; tests have it",
    "dpojax score": "needs a reward model; tests/test_reward_models.py trains one",
    "dpojax generate --model runs/dpo/final --chat": "tests/test_chat.py talks with it",
    "dpojax watch": "serves until it is stopped; tests/test_report.py does",
    "dpojax plan": "needs the TPUs' compiler; tests/test_planning.py has it",
    "dpojax completion": "tests/test_completion.py runs the shells",
    "tensorboard": "another package; tests/test_trackers.py reads what it reads",
    "gcloud": "needs a cloud; tests/test_tpu_setup.py has stand-ins",
    "./tpu_setup.sh": "likewise",
    ".venv/bin/dpojax": "likewise",
    "srun": "needs a cluster, and the lines around it are its arguments",
    "output=": "of the same script",
    "place=": "of the same script",
    "arguments=": "of the same script",
    "if ": "of the same script",
    "#": "a comment",
}
# What makes a command small.
SHORT = (
    "--steps 2 --batch-size 4 --max-length 64 --test-size 4 --sample-prompts 2 "
    "--sample-tokens 4 --log-every 1"
)
EXAMPLES = "--max-length 64 --test-size 4 --kl-samples 4 --sample-tokens 4"
FLAGS = {
    "train": SHORT,
    "sweep": SHORT,
    "eval": EXAMPLES,
    "generate": "--max-new-tokens 4",
}
RECIPE = """
model_name_or_path: runs/sft/final
dataset_name: pairs.jsonl.gz
learning_rate: 1e-6
beta: 0.1
"""


def lines() -> list[str]:
    """Of all blocks that are for a shell, in their order; continued ones joined."""
    found = []
    for text in TEXTS.values():
        for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL):
            prompts = [line for line in block.splitlines() if line.startswith("$ ")]
            words = block.split(maxsplit=1)[0]
            if language == "bash" or (not language and words in ("dpojax", "pip")):
                joined = re.sub(r"(\\|&&)\n\s*", " ", block)
                found += [line.strip() for line in joined.splitlines() if line.strip()]
            elif prompts:
                found += [line.removeprefix("$ ") for line in prompts]
    return found


def reason(line: str) -> str | None:
    spaced = " ".join(line.split())
    return next(
        (why for start, why in NOT_RUN.items() if spaced.startswith(start)), None
    )


def smaller(line: str) -> list[str]:
    """The words after ``dpojax``."""
    line = line.replace("--preset small", "--preset tiny")
    words = shlex.split(line, comments=True)[1:]
    return words + FLAGS.get(words[0], "").split()


def test_every_line_is_run_or_says_why_not():
    run = [line for line in lines() if reason(line) is None]
    assert len(run) >= 11
    assert all(line.startswith("dpojax ") for line in run), run


@pytest.mark.slow
def test_lines_run_one_after_the_other(
    place: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for file in (shared / "tokenizers").glob("gpt2_*"):
        shutil.copy(file, tmp_path)
    pairs = (place / "pairs.jsonl").read_bytes()
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(pairs))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for line in lines():
        if reason(line) is None:
            if "--model runs/first" in line:  # which the embedded task would leave
                shutil.copytree("runs/sft", "runs/first/sft")
                shutil.copy(place / "pairs.jsonl", "runs/first")
            main(smaller(line))
    for name in (
        "runs/dpo/final",
        "runs/from-trl/final",
        "runs/tracked/final",
        "hf/dpo",
        "hf/lora",
    ):
        assert (tmp_path / name / "README.md").is_file(), name
    assert (tmp_path / "runs/dpo/report.html").is_file()
