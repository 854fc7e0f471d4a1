"""An exported model scored by lm-eval: its log-likelihoods are ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpojax.command_config import InitConfig
from dpojax.commands import init
from dpojax.data.packing import Example, as_batch
from dpojax.data.tokenize import load_tokenizer
from dpojax.loading import load_model
from dpojax.log_probs import completion_log_probs
from dpojax.placing import Keeping
from dpojax.sharding import make_mesh

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytestmark = pytest.mark.slow

_DOCUMENTS = [
    {"question": "The sky is", "choices": ["blue", "a long way down"], "answer": 0},
    {"question": "Two and two make", "choices": ["five", "four"], "answer": 1},
]
_TASK = """
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
def exported(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "model"
    vocabulary = str(shared / "tokenizers" / "gpt2_encoder.json")
    init(InitConfig(output=str(directory), tokenizer=vocabulary, preset="tiny"))
    return directory


@pytest.fixture(scope="module")
def samples(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What lm-eval says of each document, in its own process and without a network."""
    here = tmp_path_factory.mktemp("lm_eval")
    data = here / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, _DOCUMENTS)))
    (here / "task.yaml").write_text(_TASK.replace("DATA", str(data)))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(here)}
    flags = {
        "--model": "hf",
        "--model_args": f"pretrained={exported},dtype=float32",
        "--tasks": "local_choices",
        "--include_path": str(here),
        "--device": "cpu",
        "--batch_size": "1",
        "--output_path": str(here / "out"),
    }
    listed = [word for pair in flags.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *listed, "--log_samples"],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = here.glob("out/**/samples_local_choices*.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()]


def test_lm_eval_finds_the_log_likelihoods_that_dpojax_finds(
    exported: Path, samples: list[Any]
):
    tokenizer = load_tokenizer(str(exported))
    loaded = load_model(str(exported), Keeping(make_mesh(), "float32"))
    assert len(samples) == len(_DOCUMENTS)
    for sample in samples:
        document = sample["doc"]
        prompt = tokenizer.encode(document["question"])
        completions = [
            np.array(tokenizer.encode(" " + choice), np.int32)
            for choice in document["choices"]
        ]
        example = Example(np.array(prompt, np.int32), tuple(completions))
        batch = as_batch([[example]], length=32)
        ours = np.asarray(
            completion_log_probs(
                *jax.jit(loaded.model.apply)(loaded.params, batch), batch
            )
        ).ravel()[: len(completions)]
        theirs = [float(response[0][0]) for response in sample["resps"]]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_the_files_are_those_that_other_engines_read(exported: Path):
    """vLLM and llama.cpp's converter go by these names."""
    from safetensors.numpy import load_file

    settings = json.loads((exported / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert settings["model_type"] == "llama"
    files = {path.name for path in exported.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= files
    tensors = load_file(exported / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    assert "model.layers.0.self_attn.q_proj.weight" in tensors
    assert {str(tensor.dtype) for tensor in tensors.values()} <= {"float32", "bfloat16"}
