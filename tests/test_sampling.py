"""The generate command: whole runs on a tiny model, and what it refuses."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpojax.cli import main
from dpojax.command_config import GenerateConfig, InitConfig
from dpojax.commands import init
from dpojax.completions import Settle, Settled, make_settle
from dpojax.data.prompt_files import read_prompts
from dpojax.data.synthetic import make_tokenizer
from dpojax.evaluation import make_sampler
from dpojax.generate import trim
from dpojax.loading import load_model
from dpojax.placing import Keeping
from dpojax.sampling import generate
from dpojax.sharding import make_mesh, make_placement

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} said {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}I{% endif %}"
)
PROMPTS = ("I saw this film", "On Saturday I read", "I")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the embedded task's tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("models")
    make_tokenizer().save_pretrained(directory / "tokenizer")
    (directory / "template.jinja").write_text(TEMPLATE)
    settings = InitConfig(
        output=str(directory / "tiny"),
        tokenizer=str(directory / "tokenizer"),
        chat_template=str(directory / "template.jinja"),
        preset="tiny",
    )
    return init(settings)


@pytest.fixture
def config(model: Path) -> GenerateConfig:
    return GenerateConfig(model=str(model), prompt=PROMPTS, max_new_tokens=8)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_prompts_with_their_samples_are_written_in_order(
    config: GenerateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "new" / "completions.jsonl"
    continued = generate(replace(config, num_samples=3, output=str(output)))
    found = lines_of(output)
    assert [row.keys() for row in found] == 3 * [{"prompt", "completions"}]
    assert [row["prompt"] for row in found] == list(PROMPTS)
    assert [len(set(row["completions"])) for row in found] == [3, 3, 3]
    assert [tuple(row["completions"]) for row in found] == [c for _, c in continued]
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert "9 completions of 3 prompts" in capsys.readouterr().out


def test_the_seed_decides_the_samples(config: GenerateConfig):
    first, again, other = (generate(replace(config, seed=s)) for s in (3, 3, 4))
    assert first == again != other


def test_a_stop_string_ends_a_completion_before_it(config: GenerateConfig):
    config = replace(config, max_new_tokens=40)
    whole = generate(config)
    stop = whole[0].completions[0][3:6]
    stopped = generate(replace(config, stop=(stop, "never said")))
    for one, other in zip(whole, stopped, strict=True):
        assert other.completions[0] == one.completions[0].partition(stop)[0]
    assert stopped != whole


def test_a_stop_string_saves_steps(model: Path):
    """Of 200 steps few are taken, and their tokens are the first of those 200."""
    mesh = make_mesh()
    loaded = load_model(str(model), Keeping(mesh))
    settle = make_settle(loaded.tokenizer, [" "])
    lengths: list[int] = []

    def counting(prompt: Sequence[int], completion: Sequence[int]) -> Settled:
        lengths.append(len(completion))
        return settle(prompt, completion)

    def sample(settle: Settle | None) -> list[list[int]]:
        sampler = make_sampler(
            loaded,
            num_new=200,
            batch_size=4,
            placement=make_placement(mesh),
            num_samples=2,
            settle=settle,
        )
        return sampler(loaded.params, [[5], [6, 7]], 0)

    whole, stopped = sample(None), sample(counting)
    assert max(lengths) <= 40
    for one, other in zip(whole, stopped, strict=True):
        said = trim(other, loaded.eos_token)
        said = said[:-1] if said[-1] == loaded.eos_token else said
        assert said == one[: len(said)] and " " in loaded.tokenizer.decode(said)


def test_what_is_printed_is_each_prompt_with_its_completion(
    config: GenerateConfig, capsys: pytest.CaptureFixture[str]
):
    continued = generate(replace(config, num_samples=2))
    printed = capsys.readouterr().out
    for prompt, completions in continued:
        assert isinstance(prompt, str) and len(completions) == 2
        assert all(prompt + text in printed for text in completions)


def test_truncation_reaches_the_samples(config: GenerateConfig):
    """Of one token alone, samples are what temperature 0 takes."""
    greedy = generate(replace(config, temperature=0.0))
    assert generate(replace(config, top_k=1)) == greedy
    assert generate(replace(config, top_p=1e-6)) == greedy
    assert generate(replace(config, min_p=0.999999)) == greedy
    assert generate(config) != greedy


# -- Files of prompts --------------------------------------------------------------


def test_a_file_of_strings_and_messages_is_continued(
    config: GenerateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    chat = [{"role": "user", "content": "I saw this film"}]
    rows = [{"prompt": "I read", "chosen": "x"}, {"prompt": chat}]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    settings = replace(config, prompt=(), prompts_file=str(file))
    continued = generate(settings)
    assert "user: I saw this film\n" in capsys.readouterr().out
    generate(replace(settings, output=str(output)))
    found = lines_of(output)
    assert [row["prompt"] for row in found] == ["I read", chat]
    assert [tuple(row["completions"]) for row in found] == [c for _, c in continued]


def test_lines_of_text_are_prompts_and_blank_ones_are_none(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("I saw\n\n  I read  \n")
    assert read_prompts(str(file)) == ["I saw", "  I read  "]


def test_a_system_column_is_the_first_message(tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "I saw", "system": "Be brief."}))
    assert read_prompts(str(file)) == [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "I saw"},
        ]
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"promt": "x"}', r"line 1 has no 'prompt'; .*is 'promt' meant"),
        ("a.jsonl", '{"prompt": 3}', "prompt is neither a string nor a list"),
        ("a.jsonl", '{"prompt"', "line 1 is not JSON"),
        ("a.jsonl", "\n", "holds no prompt"),
        ("a.txt", " \n", "holds no prompt"),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user", "content": "x"}], "tools": [{"a": 1}]}',
            "line 1 has tools",
        ),
    ],
)
def test_a_file_without_usable_prompts_is_refused(
    tmp_path: Path, name: str, content: str, message: str
):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    with pytest.raises(ValueError, match="There is no prompts file"):
        read_prompts(str(file))
    file.write_bytes(np.array([255, 254], np.uint8).tobytes())
    with pytest.raises(ValueError, match="is not text"):
        read_prompts(str(file))


# -- Refused -----------------------------------------------------------------------


@pytest.fixture
def fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """What the command says of flags that it refuses before it loads a model."""
    monkeypatch.chdir(tmp_path)
    Path("there.jsonl").write_text("")

    def run(flags: list[str]) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "--model", "none", *flags])
        assert stopped.value.code == 2
        return capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either by --prompt or by --prompts-file"),
        (["--prompts-file", "x", "--prompt", "y"], "either by --prompt or by"),
        (["--temperature", "0", "--top-p", "0.9"], "top_p has no effect at temp"),
        (["--temperature", "0", "--num-samples", "2"], "all 2 samples of a prompt"),
        (["--temperature", "-1"], "temperature is -1; it must not be negative"),
        (["--top-k", "0"], "top_k is 0; it must be at least 1"),
        (["--top-p", "1"], "top_p is 1; it must lie between 0 and 1"),
        (["--min-p", "-0.1"], "min_p is -0.1; it must lie between 0 and 1"),
        (["--num-samples", "0"], "num_samples is 0; it must be positive"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; it must be positive"),
        (["--batch-size", "0"], "batch_size is 0; it must be positive"),
        (["--seed", "-1"], "seed is -1; it must not be negative"),
        (["--stop", ""], "A stop string is empty"),
        (["--output", "there.jsonl"], "there.jsonl already exists; choose another"),
        (["--mesh.data", "3"], "does not fit 4 devices"),
    ],
)
def test_a_setting_that_cannot_work_or_take_effect(
    fail: Callable[[list[str]], str], flags: list[str], message: str
):
    given = flags if not flags or "--prompt" in flags else ["--prompt", "I", *flags]
    printed = fail(given)
    assert "dpojax: error: " in printed and message in printed


def test_a_top_k_of_the_whole_vocabulary_is_refused_once_it_is_known(
    config: GenerateConfig,
):
    with pytest.raises(ValueError, match=r"top_k is 9999, but the vocabulary has \d+"):
        generate(replace(config, top_k=9999))


def test_more_tokens_than_positions_are_refused_by_the_flag_that_mends_it(
    config: GenerateConfig,
):
    with pytest.raises(
        ValueError, match=r"exceed the 2048 positions .*; lower --max-new-tokens, or"
    ):
        generate(replace(config, max_new_tokens=2046))
