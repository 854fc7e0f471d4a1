"""Conversations on the terminal: scripted ones, piped ones, and what is refused."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpojax import chat as room
from dpojax.chat import certain_part, chat
from dpojax.cli import main
from dpojax.commands import init
from dpojax.config import GenerateConfig, InitConfig
from dpojax.data.synthetic import make_tokenizer
from dpojax.sampling import generate

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} said {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}I{% endif %}"
)
LINES = ("I saw this film", "It was good", "I read a novel")
Script = Callable[..., None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of 128 positions, with a chat template and without."""
    directory = tmp_path_factory.mktemp("models")
    make_tokenizer().save_pretrained(directory / "tokenizer")
    (directory / "template.jinja").write_text(TEMPLATE)
    settings = InitConfig(
        output=str(directory / "mute"),
        tokenizer=str(directory / "tokenizer"),
        preset="tiny",
        max_length=128,
    )
    init(settings)
    template = str(directory / "template.jinja")
    init(replace(settings, output=str(directory / "chat"), chat_template=template))
    return directory


@pytest.fixture
def config(models: Path) -> GenerateConfig:
    return GenerateConfig(
        model=str(models / "chat"), chat=True, max_new_tokens=12, temperature=0.0
    )


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """What the user types, then the end of the input."""

    def type_in(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))

    return type_in


def test_each_answer_continues_the_whole_conversation(
    config: GenerateConfig,
    script: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """The answers are what the same messages get as a prompt in a file."""
    settings = replace(config, temperature=1.0)
    script(LINES[0], "  ", LINES[1])
    messages = chat(settings)
    printed = capsys.readouterr().out
    assert [m["role"] for m in messages] == 2 * ["user", "assistant"]
    assert tuple(m["content"] for m in messages[::2]) == LINES[:2]
    assert all(f"> {m['content']}\n" in printed for m in messages[1::2])
    file = tmp_path / "prompts.jsonl"
    for turn in range(2):
        file.write_text(json.dumps({"prompt": messages[: 2 * turn + 1]}))
        of_file = replace(settings, chat=False, prompts_file=str(file), seed=turn)
        ((_, answers),) = generate(of_file)
        assert answers == (messages[2 * turn + 1]["content"],)


def test_flags_of_sampling_hold_in_a_chat_and_turns_have_seeds_of_their_own(
    config: GenerateConfig, script: Script
):
    settings = replace(config, temperature=1.0)
    conversations = []
    for seed in (1, 1, 2):
        script(*LINES[:2])
        conversations.append(chat(replace(settings, seed=seed)))
    first, again, other = conversations
    assert first == again and first[1] != other[1]
    script(LINES[0])
    assert chat(replace(settings, top_k=1))[1] == chat_greedily(config, script)[1]


def chat_greedily(config: GenerateConfig, script: Script) -> list[dict[str, Any]]:
    script(LINES[0])
    return chat(config)


def test_an_answer_ends_before_a_stop_string(
    config: GenerateConfig, script: Script, capsys: pytest.CaptureFixture[str]
):
    whole = chat_greedily(config, script)[1]["content"]
    capsys.readouterr()
    stop = whole[4:7]
    stopped = chat_greedily(replace(config, stop=(stop,)), script)[1]["content"]
    assert stopped == whole.partition(stop)[0] != whole
    assert f"> {stopped}\n" in capsys.readouterr().out


def test_an_answer_is_shown_while_it_is_sampled(
    config: GenerateConfig, script: Script, monkeypatch: pytest.MonkeyPatch
):
    shown: list[str] = []
    monkeypatch.setattr(room, "show_part", shown.append)
    answer = chat_greedily(replace(config, max_new_tokens=30), script)[1]["content"]
    assert "".join(shown) == answer
    assert len([part for part in shown if part]) >= 3


def test_what_may_still_change_is_not_shown():
    assert certain_part("it is so", ()) == "it is so"
    assert certain_part("it is so\ufffd", ()) == "it is so"
    assert certain_part("it is so", ("some", "o no")) == "it is "
    assert certain_part("it is so", ("is",)) == "it "
    assert certain_part("it is so", ("so far",)) == "it is "


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, EOFError])
def test_an_interrupted_chat_ends_cleanly(
    config: GenerateConfig,
    monkeypatch: pytest.MonkeyPatch,
    interruption: type[BaseException],
):
    def interrupt(prompt: str) -> str:
        raise interruption

    monkeypatch.setattr("builtins.input", interrupt)
    assert chat(config) == []


def test_a_conversation_beyond_the_models_positions_is_refused(
    config: GenerateConfig, script: Script
):
    script(LINES[0])
    message = (
        r"Sequences of \d+ tokens exceed the 128 positions of the model "
        r"\(max_position_embeddings\); allow fewer --max-new-tokens, or begin a new"
    )
    with pytest.raises(ValueError, match=message):
        chat(replace(config, max_new_tokens=120))


def test_a_model_without_a_chat_template_is_refused(
    config: GenerateConfig, models: Path
):
    with pytest.raises(ValueError, match="has no chat template, so there is no tell"):
        chat(replace(config, model=str(models / "mute")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "I"], "--prompt has no effect on a --chat"),
        (["--prompts-file", "x"], "--prompts-file has no effect on a --chat"),
        (["--output", "x"], "--output has no effect on a --chat"),
        (["--num-samples", "2"], "--num-samples has no effect on a --chat"),
        (["--batch-size", "2"], "--batch-size has no effect on a --chat"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; it must be positive"),
        (["--stop", ""], "A stop string is empty"),
    ],
)
def test_a_setting_without_an_effect_on_a_chat_is_refused(
    capfd: pytest.CaptureFixture[str], flags: list[str], message: str
):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--model", "none", "--chat", *flags])
    assert stopped.value.code == 2
    assert f"dpojax: error: {message}" in capfd.readouterr().err


def test_a_list_of_prompts_is_no_chat(config: GenerateConfig):
    with pytest.raises(ValueError, match="--chat has no prompts to continue"):
        generate(config)


def test_the_command_talks_through_pipes(config: GenerateConfig, script: Script):
    expected = chat_greedily(config, script)[1]["content"]
    flags = ["--max-new-tokens", "12", "--temperature", "0"]
    command = [sys.executable, "-m", "dpojax", "generate", "--chat", *flags]
    ended = subprocess.run(
        [*command, "--model", config.model],
        input=f"{LINES[0]}\n",
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"> {expected}\n> ")
