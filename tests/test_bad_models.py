"""Model directories that are damaged or of another kind: one sentence, exit code 2.

Through the command line, so that nobody sees a traceback; nothing is written, nothing
is unpickled, and no code from a directory is run.
"""

import io
import json
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from dpojax.cli import main

Damage = Callable[[Path], None]
UP = "model.layers.1.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
# Unpickled, it would end the process.
PICKLE = b"cos\n_exit\n(I3\ntR."


@pytest.fixture
def refusal(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[[Damage], str]:
    """The error for a model that was damaged, by `train`, which leaves nothing."""
    monkeypatch.chdir(tmp_path)
    copied = Path(shutil.copytree(model, "model"))
    pairs = [{"prompt": f"p{n}", "chosen": "c", "rejected": "r"} for n in range(9)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))

    def refused(damage: Damage) -> str:
        damage(copied)
        arguments = "train --model model --data pairs.jsonl --output run --test-size 2"
        with pytest.raises(SystemExit) as stopped:
            main(arguments.split())
        printed = capfd.readouterr().err
        assert stopped.value.code == 2
        start, error, sentence = printed.partition("dpojax: error: ")
        assert error and "Traceback" not in start and sentence.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "model",
            "pairs.jsonl",
        ]
        return sentence.strip()

    return refused


# -- Ways to damage a directory ----------------------------------------------------


def tensors(change: Callable[[dict[str, np.ndarray]], Mapping[str, Any]]) -> Damage:
    """Other tensors, made of those there are; None removes one."""

    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        old = load_file(path)
        new = {**old, **change(old)}
        save_file(
            {name: array for name, array in new.items() if array is not None}, path
        )

    return damage


def spoilt(value: float, dtype: Any, name: str = UP) -> Damage:
    """One value of a tensor is another, all being of a dtype."""

    def change(old: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        new = {name: array.astype(dtype) for name, array in old.items()}
        new[name].flat[-1] = value
        return new

    return tensors(change)


def written(name: str, content: str | bytes) -> Damage:
    def damage(directory: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (directory / name).write_bytes(data)

    return damage


def cut(name: str, size: int) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / name
        path.write_bytes(path.read_bytes()[:size])

    return damage


def settings(**changes: Any) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def sharded(*then: Damage) -> Damage:
    """The tensors in two files with an index, and then what else is done."""

    def damage(directory: Path) -> None:
        old = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        files = {name: f"part-{len(name) % 2}.safetensors" for name in old}
        for file in set(files.values()):
            part = {name: old[name] for name in old if files[name] == file}
            save_file(part, directory / file)
        write_index(directory, {"metadata": {}, "weight_map": files})
        for step in then:
            step(directory)

    return damage


def write_index(directory: Path, content: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def index(change: Callable[[dict[str, str]], Any]) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        write_index(directory, change(json.loads(path.read_text())["weight_map"]))

    return damage


def removed(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def only_pickle(name: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / name).write_bytes(PICKLE)

    return damage


# -- Weights -----------------------------------------------------------------------

FILES = {
    "cut short": (
        cut("model.safetensors", 100_000),
        r"model/model\.safetensors cannot be read: .* cut short; fetch or write it",
    ),
    "empty": (
        cut("model.safetensors", 0),
        r"model/model\.safetensors cannot be read: .* damaged",
    ),
    "a pickle of that name": (
        written("model.safetensors", PICKLE),
        r"model/model\.safetensors cannot be read: .* damaged",
    ),
    "a pointer of Git LFS": (
        written("model.safetensors", POINTER),
        r"model/model\.safetensors is a pointer of Git LFS, .* `git lfs pull`",
    ),
    "a shard that is a pointer": (
        sharded(written("part-1.safetensors", POINTER)),
        r"model/part-1\.safetensors is a pointer of Git LFS",
    ),
    "pytorch_model.bin": (
        only_pickle("pytorch_model.bin"),
        r"model has no model\.safetensors .*, only pytorch_model\.bin: a pickle, .* "
        "Save the model as safetensors",
    ),
    "weights.pt": (only_pickle("weights.pt"), r"only weights\.pt: a pickle"),
    "no weights": (
        removed("model.safetensors"),
        r"model has no model\.safetensors and no index .*; other formats",
    ),
    "a missing shard": (
        sharded(removed("part-1.safetensors")),
        r"model/part-1\.safetensors cannot be read: .* missing",
    ),
    "a shard that is cut short": (
        sharded(cut("part-0.safetensors", 5000)),
        r"model/part-0\.safetensors cannot be read: .* cut short",
    ),
    "a tensor in another shard than the index says": (
        sharded(
            index(lambda files: {"weight_map": files | {UP: "part-0.safetensors"}})
        ),
        rf"index\.json says that {UP} is in part-0\.safetensors, which lacks it",
    ),
    "an index that is a list": (
        sharded(index(lambda files: list(files))),
        r"index\.json is not an index of shards",
    ),
    "an index without files": (
        sharded(index(lambda files: {"metadata": {}})),
        r"index\.json is not an index of shards",
    ),
    "an index of numbers": (
        sharded(index(lambda files: {"weight_map": dict.fromkeys(files, 3)})),
        r"index\.json is not an index of shards",
    ),
    "an index that is cut short": (
        sharded(cut("model.safetensors.index.json", 50)),
        r"index\.json is not an index of shards",
    ),
}
TENSORS = {
    "missing": (
        tensors(lambda old: {UP: None}),
        rf"model lacks the tensor {UP}, .*\(missing: 1 of \d+\)",
    ),
    "left over": (
        tensors(lambda old: {"model.layers.2.mlp.up_proj.weight": old[UP]}),
        r"does not account for: model\.layers\.2\.mlp\.up_proj\.weight",
    ),
    "an unknown bias": (
        tensors(
            lambda old: {
                "model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)
            }
        ),
        r"does not account for: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "transposed": (
        tensors(lambda old: {UP: np.ascontiguousarray(old[UP].T)}),
        rf"{UP} has shape \(64, 256\), but config\.json asks for \(256, 64\)",
    ),
    "shorter": (
        tensors(lambda old: {"model.norm.weight": np.zeros(31, np.float32)}),
        r"norm\.weight has shape \(31,\), but config\.json asks for \(64,\)",
    ),
    "NaN": (
        spoilt(np.nan, np.float32),
        rf"model/model\.safetensors: {UP} holds NaN or infinity; .* earlier",
    ),
    "NaN of bfloat16": (spoilt(np.nan, bfloat16), rf"{UP} holds NaN or infinity"),
    "infinity": (spoilt(-np.inf, np.float32), rf"{UP} holds NaN or infinity"),
    "infinity of bfloat16": (spoilt(np.inf, bfloat16), rf"{UP} holds NaN or infinity"),
    "NaN of float16": (spoilt(np.nan, np.float16), rf"{UP} holds NaN or infinity"),
    "too large for float32": (spoilt(1e300, np.float64), rf"{UP} holds NaN or inf"),
    "NaN at the end of the embedding": (
        spoilt(np.nan, np.float32, "model.embed_tokens.weight"),
        r"model\.embed_tokens\.weight holds NaN",
    ),
    "integers": (
        tensors(lambda old: {UP: np.ones_like(old[UP], np.int8)}),
        rf"model/model\.safetensors: {UP} is of the dtype I8; .* Quantised models",
    ),
    "packed integers": (
        tensors(lambda old: {UP: np.ones((256, 32), np.uint8)}),
        rf"{UP} has shape \(256, 32\), but",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_hold_no_such_weights_are_refused(
    refusal: Callable[[Damage], str], case: str
):
    damage, message = FILES[case]
    assert re.search(message, refusal(damage))


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_no_weights_of_the_model_are_refused_by_name(
    refusal: Callable[[Damage], str], case: str
):
    damage, message = TENSORS[case]
    assert re.search(message, refusal(damage))


# -- Settings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size = None; it must be a positive integer."),
        ({"vocab_size": "512"}, "vocab_size = '512'; it must be a positive integer."),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "'auto_map' ({'AutoModel': 'evil"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(
    refusal: Callable[[Damage], str], changes: dict[str, Any], message: str
):
    sentence = refusal(settings(**changes))
    assert sentence.startswith("config.json has ") and message in sentence


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{'a': 1}", "[1, 2]", "null", b"\xff\xfe\x00"])
def test_settings_that_are_no_json_object_are_refused(
    refusal: Callable[[Damage], str], name: str, content: str | bytes
):
    sentence = refusal(written(name, content))
    assert re.match(rf"model/{name} is not (a )?JSON", sentence)


# -- Tokenizer ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("tokenizer.json", 2000), r"tokenizer\.json is not JSON .* damaged"),
        (cut("tokenizer.json", 0), r"tokenizer\.json is not JSON .* damaged"),
        (written("tokenizer.json", POINTER), r"tokenizer\.json is not JSON"),
        (written("tokenizer.json", "null"), r"tokenizer\.json is not a JSON object"),
        (written("tokenizer.json", "{}"), r"tokenizer\.json holds no model with a voc"),
        (
            written("tokenizer.json", '{"model": {"vocab": {}}}'),
            r"tokenizer\.json holds no list of added tokens",
        ),
        (
            written(
                "tokenizer.json",
                '{"model": {"vocab": {}, "type": "New"}, "added_tokens": []}',
            ),
            r"tokenizer\.json holds a model of the type 'New'; .* BPE",
        ),
        (written("tokenizer_config.json", "[]"), r"config\.json is not a JSON object"),
    ],
)
def test_a_damaged_tokenizer_is_refused(
    refusal: Callable[[Damage], str], damage: Damage, message: str
):
    assert re.match(f"model/.*{message}", refusal(damage))


# -- Code --------------------------------------------------------------------------


def test_nothing_is_unpickled_and_no_code_of_a_directory_is_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (directory / name).write_bytes(PICKLE)
    for name in ("modeling_llama", "tokenization_llama", "configuration_llama"):
        (directory / f"{name}.py").write_text("raise SystemExit(3)\n")
    path = directory / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["tokenization_llama.Mine", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("Something was unpickled.")

    class Unpickler(pickle.Unpickler):  # libraries derive theirs from it
        __init__ = refuse

    monkeypatch.setattr(pickle, "Unpickler", Unpickler)
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    with pytest.raises(pytest.fail.Exception):
        pickle.load(io.BytesIO(PICKLE))
    arguments = "generate", "--model", str(directory), "--prompt", "I saw"
    main([*arguments, "--max-new-tokens", "2"])
