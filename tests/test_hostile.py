"""Files made to escape, to hang or to exhaust: each gets one sentence, and no more.

Weights, tokenizers, templates and data as a stranger might write them; and secrets of
the environment, which a run leaves nowhere.
"""

import gzip
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_bad_records import write
from test_tokenize import TURNS, as_chat, as_record, make_tokenizer

from dpojax.config import TrainConfig
from dpojax.data import files, template_limits
from dpojax.data.records import read_records
from dpojax.data.tokenize import encode_prompt, load_tokenizer, tokenize_records
from dpojax.models.json_files import read_object
from dpojax.models.weight_files import find_tensors
from dpojax.run import run


def refusal(function: Callable[..., Any], *args: Any, **settings: Any) -> str:
    """The one short sentence with which something is refused, by dpojax itself."""
    with pytest.raises(ValueError) as refused:
        function(*args, **settings)
    message = str(refused.value)
    assert "/dpojax/" in str(refused.traceback[-1].path)
    assert message and "\n" not in message and len(message) < 1000
    return message


# -- Weights -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../other/a.safetensors", "/etc/a.safetensors", "", ".", "..", "a.bin"]
)
def test_an_index_names_nothing_but_files_beside_it(tmp_path: Path, name: str):
    (tmp_path / "other").mkdir()
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other/a.safetensors")
    directory = tmp_path / "model"
    directory.mkdir()
    index = {"weight_map": {"x": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names the shard" in refusal(find_tensors, directory)


def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "or no file" in refusal(find_tensors, tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, '["%s"]' % ("x" * 10**6)])
def test_settings_that_are_deep_or_large_are_refused_briefly(
    tmp_path: Path, content: str
):
    path = tmp_path / "config.json"
    path.write_text(content)
    assert "config.json is not" in refusal(read_object, path)
    assert "tokenizer" not in refusal(find_tensors, tmp_path)


# -- Tokenizers --------------------------------------------------------------------

# What is changed in tokenizer.json or in tokenizer_config.json.
TOKENIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "merges of no tokens": (
        "tokenizer.json",
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}},
    ),
    "ids that are none": (
        "tokenizer.json",
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    ),
    "a regular expression that is none": (
        "tokenizer.json",
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ),
    "a regular expression that backtracks for ever": (
        "tokenizer.json",
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(p+)+$x"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ),
    "an end that panics": (
        "tokenizer.json",
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ),
    "tokens that are numbers": ("tokenizer.json", {"added_tokens": [1]}),
    "an end that is a number": ("tokenizer_config.json", {"eos_token": 5}),
    "a class that is a number": ("tokenizer_config.json", {"tokenizer_class": 5}),
    "code": ("tokenizer_config.json", {"auto_map": 5}),
    "an argument twice": ("tokenizer_config.json", {"self": "x"}),
    "a template that is a number": ("tokenizer_config.json", {"chat_template": 5}),
    "a template of a name that leads elsewhere": (
        "tokenizer_config.json",
        {"chat_template": [{"name": "../../../evil", "template": "x"}]},
    ),
    "a file of a name that leads elsewhere": (
        "tokenizer_config.json",
        {"fast_tokenizer_files": ["../../tokenizer.4.0.json"]},
    ),
}


def write_tokenizer(
    directory: Path, changes: dict[str, dict[str, Any]] | None = None
) -> Path:
    make_tokenizer().save_pretrained(directory)
    for name, some in (changes or {}).items():
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | some))
    return directory


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(tmp_path: Path, case: str):
    name, changes = TOKENIZERS[case]
    directory = write_tokenizer(tmp_path / "tokenizer", {name: changes})

    def use() -> None:
        tokenizer = load_tokenizer(directory)
        tokenize_records([as_record("p" * 40, "x", "y")], tokenizer)

    assert "okenizer" in refusal(use)


def test_paths_in_a_tokenizers_settings_are_not_read_and_its_code_not_run(
    tmp_path: Path,
):
    changes = {
        "vocab_file": "/etc/passwd",
        "tokenizer_file": "/etc/passwd",
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "trust_remote_code": True,
    }
    directory = write_tokenizer(tmp_path / "t", {"tokenizer_config.json": changes})
    (directory / "evil.py").write_text("raise SystemExit(3)\n")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    tokenizer.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        assert "root:" not in path.read_text("utf-8")


def test_a_link_out_of_a_tokenizers_directory_is_refused(tmp_path: Path):
    (tmp_path / "secret").write_text("{{ 'key' }}")
    directory = write_tokenizer(tmp_path / "tokenizer")
    (directory / "chat_template.jinja").symlink_to(tmp_path / "secret")
    assert "chat_template.jinja is a link to" in refusal(load_tokenizer, directory)
    (directory / "chat_template.jinja").unlink()
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (directory / name).symlink_to(tmp_path / "secret")
    assert load_tokenizer(directory).chat_template is None


def test_links_of_the_hubs_cache_and_to_whole_directories_are_followed(tmp_path: Path):
    cache = tmp_path / "models--some--model"
    written = write_tokenizer(tmp_path / "written")
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(written.iterdir()):
        path.rename(cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "linked").symlink_to(snapshot)
    for directory in (snapshot, tmp_path / "linked"):
        assert load_tokenizer(directory).eos_token == "</s>"


# -- Chat templates ----------------------------------------------------------------

LOOP = "{% for a in range(99999) %}"
TEMPLATES = {
    "attributes": ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is uns"),
    "changes": ("{{ messages.clear() }}", "'clear' of 'list' object is unsafe"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "a recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a long range": ("{% for a in range(1000000) %}{% endfor %}", "Range too big"),
    "a division": ("{{ 1 / 0 }}", "division by zero"),
    "half a character": (r"{{ '\ud800' }}", "is not text"),
    "a power": ("{{ 9 ** 9999999999 }}", "raises to a power in line 1"),
    "a large text": ("{{ 'a' * 9999999999 }}", "takes more than 0 GiB"),
    "loops in loops": (LOOP * 3 + "{% endfor %}" * 3, "more than 1 seconds"),
    "a text that doubles": (
        "{% set n = namespace(x=messages[0].content) %}{% for a in range(99) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "takes more than",
    ),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_hostile_template_is_refused(case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 1)
    monkeypatch.setattr(template_limits, "MOST_MEMORY", 2**28)
    template, reason = TEMPLATES[case]
    tokenizer = make_tokenizer("$A", template)
    begun = time.process_time()
    assert reason in refusal(tokenize_records, [as_chat("Hi", "a", "b")], tokenizer)
    assert time.process_time() - begun < 20


def test_limits_leave_a_process_as_it_was():
    import resource
    import signal

    def state() -> tuple[Any, ...]:
        kinds = resource.RLIMIT_AS, resource.RLIMIT_CPU
        timers = signal.getitimer(signal.ITIMER_REAL)
        handler = signal.getsignal(signal.SIGALRM)
        return *map(resource.getrlimit, kinds), timers, handler

    before = state()
    tokenizer = make_tokenizer("$A", TURNS.replace("{END}", "</s>"))
    tokenize_records([as_chat("Hi", "a", "b")], tokenizer)
    with pytest.raises(ValueError):
        encode_prompt([{"role": "user"}], make_tokenizer("$A", "{{ 1 / 0 }}"))
    assert state() == before


def test_calls_by_name_are_no_powers():
    template = "{{ dict(**{'a': 1}).a }}" + TURNS.replace("{END}", "</s>")
    tokenizer = make_tokenizer("$A", template)
    assert len(tokenize_records([as_chat("Hi", "a", "b")], tokenizer)[0]) == 1


# -- Data --------------------------------------------------------------------------


def test_a_line_of_ten_megabytes_is_read_and_cut(tmp_path: Path):
    row = {"prompt": "some words " * 10**6, "chosen": "c", "rejected": "\0r"}
    path = write(tmp_path / "data.jsonl", json.dumps(row))
    records = read_records(path, split="train", test_size=0)
    assert records[0].prompt == row["prompt"]
    shorter = records[0]._replace(prompt="some words " * 10**4)
    (example,), _ = tokenize_records([shorter], make_tokenizer(), max_length=64)
    assert len(example.prompt) + len(example.completions[1]) <= 64


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "c", "rejected": "x" * 10**7, "margin": "m" * 10**7},
        {"k" * 10**7: "p", "chosen": "c"},
        {f"column {number}": 1 for number in range(10**5)},
        {"prompt\n": "p", "completion": "c", "label": ["x" * 10**6] * 10},
        {"conversations": [{"from": ["x" * 10**6], "value": "v"}] * 2},
    ],
)
def test_what_is_said_of_a_large_record_is_short(tmp_path: Path, row: dict[str, Any]):
    path = write(tmp_path / "data.jsonl", json.dumps(row))
    assert "line 1" in refusal(read_records, path, split="train", test_size=0)


def test_a_line_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "_LONGEST_LINE", 10**6)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n" + b"0" * 10**7))
    message = refusal(read_records, str(path), split="train")
    assert "line 2 has 1,000,000 characters or more" in message


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.arrow"])
def test_a_pipe_in_the_place_of_data_is_not_waited_for(tmp_path: Path, name: str):
    os.mkfifo(tmp_path / name)
    assert name in refusal(read_records, str(tmp_path / name), split="train")


@pytest.mark.parametrize("name", ["../../outside.arrow", "/etc/passwd"])
def test_saved_data_is_not_read_from_elsewhere(tmp_path: Path, name: str):
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "state.json"
    content = json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}
    state.write_text(json.dumps(content))
    source = str(tmp_path / "saved")
    assert "leads out of it" in refusal(read_records, source, split="train")


# -- Secrets -----------------------------------------------------------------------


def test_a_run_leaves_no_secret_and_lists_what_it_skipped(
    config: TrainConfig,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
    secrets = [f"{name.lower()}-5d2f8c" for name in names]
    for name, secret in zip(names, secrets, strict=True):
        monkeypatch.setenv(name, secret)
    lines = (place / "pairs.jsonl").read_text("utf-8").splitlines()
    data = write(place / "spoilt.jsonl", *lines[:-1], "{")
    short = replace(config, data=(data,), output=str(place / "short"), steps=1)
    done = run(replace(short, on_bad_record="skip"))
    printed = capfd.readouterr()
    assert "skipped 1 bad of" in printed.out
    reasons = (done.directory / "skipped.jsonl").read_text("utf-8").splitlines()
    assert len(reasons) == 1 and "line 20 is not JSON" in reasons[0]
    written = [path for path in done.directory.rglob("*") if path.is_file()]
    assert len(written) > 10
    texts = [printed.out.encode(), printed.err.encode()]
    for text in (*texts, *(path.read_bytes() for path in written)):
        assert not any(secret.encode() in text for secret in secrets)
