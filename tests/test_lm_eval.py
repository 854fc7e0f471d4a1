"""An exported model scored by lm-eval, offline: its log-likelihoods are ours."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpojax.command_config import ExportConfig
from dpojax.config import TrainConfig
from dpojax.data.packing import Example, as_batch
from dpojax.exporting import export
from dpojax.loading import load_model
from dpojax.log_probs import completion_log_probs
from dpojax.placing import Keeping
from dpojax.run import run
from dpojax.sharding import make_mesh

pytest.importorskip("lm_eval", reason="lm-eval, of the extra parity, is not installed")
pytestmark = pytest.mark.slow

DOCUMENTS = [
    {"question": "I saw this film", "choices": ["and it was good", "."], "answer": 0},
    {"question": "The story was", "choices": ["bad", "a wonderful one"], "answer": 1},
]
TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: " "
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def exported(config: TrainConfig, place: Path) -> Path:
    """What two steps of training left, exported."""
    short = replace(config, output=str(place / "short"), steps=2, sample_prompts=0)
    trained = run(short).directory
    return export(ExportConfig(run=str(trained), output=str(place / "exported")))


@pytest.fixture(scope="module")
def samples(exported: Path, place: Path) -> list[Any]:
    """What lm-eval says of each document, in a process of its own."""
    data = place / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (place / "tasks").mkdir()
    (place / "tasks" / "task.yaml").write_text(TASK.replace("DATA", str(data)))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place)}
    flags = {
        "--model": "hf",
        "--model_args": f"pretrained={exported},dtype=float32",
        "--tasks": "local_choices",
        "--include_path": str(place / "tasks"),
        "--device": "cpu",
        "--batch_size": "1",
        "--output_path": str(place / "out"),
    }
    words = [word for pair in flags.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *words, "--log_samples"],
        env=os.environ | offline,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = place.glob("out/**/samples_local_choices*.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()]


def test_lm_eval_finds_the_log_likelihoods_that_dpojax_finds(
    exported: Path, samples: list[Any]
):
    loaded = load_model(str(exported), Keeping(make_mesh(), "float32"))
    encode, apply = loaded.tokenizer.encode, jax.jit(loaded.model.apply)
    assert len(samples) == len(DOCUMENTS)
    for sample in samples:
        document = sample["doc"]
        prompt = np.array(encode(document["question"]), np.int32)
        completions = [
            np.array(encode(f" {choice}", add_special_tokens=False), np.int32)
            for choice in document["choices"]
        ]
        batch = as_batch([[Example(prompt, tuple(completions))]], length=64)
        hidden, output = apply(loaded.params, batch)
        found = completion_log_probs(hidden, output, batch)
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        np.testing.assert_allclose(np.ravel(found), theirs, rtol=1e-4)
