"""Conversations: scripted ones with a tiny model, and what is refused."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dpojax.chat import chat
from dpojax.cli import main
from dpojax.command_config import GenerateConfig
from dpojax.data.fields import Messages
from dpojax.data.synthetic import make_tokenizer
from dpojax.data.tokenize import Tokenizer, encode_prompt, load_tokenizer
from dpojax.models.decoder import DecoderConfig, make_model
from dpojax.models.families import as_settings
from dpojax.models.huggingface import write_model
from dpojax.sampling import generate

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} said {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}I{% endif %}"
)
Type = Callable[..., None]


def write(directory: Path, tokenizer: Tokenizer, max_length: int = 512) -> Path:
    """A model whose weights are large enough that it does not repeat itself."""
    shape = DecoderConfig(
        vocabulary_size=512,
        width=32,
        num_layers=1,
        num_heads=2,
        num_key_heads=2,
        head_dimension=16,
        mlp_width=32,
        max_length=max_length,
        initializer_range=0.5,
    )
    params = make_model(shape).init(jax.random.key(0))
    write_model(directory, params, as_settings(shape), tokenizer.save_pretrained)
    return directory


def with_template(template: str) -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat") / "model"
    return write(directory, with_template(TEMPLATE))


@pytest.fixture
def config(model: Path) -> GenerateConfig:
    return GenerateConfig(model=str(model), chat=True, max_new_tokens=20)


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch) -> Type:
    """Puts lines into the standard input."""

    def put(*lines: str) -> None:
        text = "".join(line + "\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return put


def continued(config: GenerateConfig, messages: Messages, tmp_path: Path) -> str:
    """What `generate` answers without --chat."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": messages}))
    plain = replace(config, chat=False, system=None, prompts_file=str(file))
    return generate(plain)[0].completions[0]


def test_every_line_is_answered_and_answers_are_all_that_is_printed(
    config: GenerateConfig, type_lines: Type, capsys: pytest.CaptureFixture[str]
):
    type_lines("I saw this film", "", "  ", "and this opera ?")
    messages = chat(config)
    assert [message["role"] for message in messages] == 2 * ["user", "assistant"]
    assert messages[0]["content"] == "I saw this film"
    assert messages[2]["content"] == "and this opera ?"
    answers = [message["content"] for message in messages[1::2]]
    assert answers[0] != answers[1] and all(answers)
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)


def test_the_first_answer_is_what_generate_says_of_the_message(
    config: GenerateConfig, type_lines: Type, tmp_path: Path
):
    type_lines("I saw this film")
    messages = chat(replace(config, seed=5, top_k=50, stop=("t",)))
    same = replace(config, seed=5, top_k=50, stop=("t",))
    assert messages[1]["content"] == continued(same, messages[:1], tmp_path)
    assert "t" not in messages[1]["content"]


def test_every_answer_follows_the_whole_conversation_and_the_system_message(
    config: GenerateConfig, type_lines: Type, tmp_path: Path
):
    settings = replace(config, temperature=0.0, system="I read this novel")
    type_lines("I saw this film", "I saw this film")
    messages = chat(settings)
    assert messages[0] == {"role": "system", "content": "I read this novel"}
    for place in (2, 4):
        expected = continued(settings, messages[:place], tmp_path)
        assert messages[place] == {"role": "assistant", "content": expected}
    assert messages[2] != messages[4]


def test_a_conversation_that_exceeds_the_positions_loses_its_oldest_messages(
    tmp_path: Path, type_lines: Type, capsys: pytest.CaptureFixture[str]
):
    tokenizer = with_template(TEMPLATE)
    directory = write(tmp_path / "model", tokenizer, max_length=60)
    config = GenerateConfig(model=str(directory), chat=True, max_new_tokens=20)
    lines = ["I saw this film", " I saw" * 20, "I saw", "On Saturday I", "I read this"]
    type_lines(*lines)
    messages = chat(replace(config, system="I read"))
    printed = capsys.readouterr().out
    limit = "exceed the 60 positions of the model (max_position_embeddings); it is not"
    assert printed.count(f"The message and an answer of 20 tokens {limit} taken.") == 1
    assert (
        "60 positions of the model (max_position_embeddings); its 2 oldest" in printed
    )
    contents = [message["content"] for message in messages]
    assert contents[0] == "I read" and contents[-2] == lines[-1]
    assert not {lines[0], lines[1]} & set(contents)
    length = len(encode_prompt(messages[:-1], tokenizer))
    assert length + 20 <= 60


def test_the_special_token_by_which_turns_end_ends_an_answer(
    model: Path, config: GenerateConfig, type_lines: Type, tmp_path: Path
):
    """A word of what the model says becomes that token."""
    greedy = replace(config, temperature=0.0)
    type_lines("I saw this film")
    whole = chat(greedy)[1]["content"]
    tokenizer = load_tokenizer(model)
    words = [str(tokenizer.decode([token])) for token in tokenizer(whole).input_ids[1:]]
    word = next(word for word in words[3:] if word not in [*words[:3], " ", " ."])
    tokenizer.add_tokens([word], special_tokens=True)
    end = "{% if m.role == 'assistant' %}" + word + "{% endif %} . "
    tokenizer.chat_template = TEMPLATE.replace(" . ", end)
    shutil.copytree(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    type_lines("I saw this film")
    answer = chat(replace(greedy, model=str(tmp_path / "model")))[1]["content"]
    assert answer == whole.partition(word)[0] != ""


def test_an_interrupt_ends_the_conversation_without_an_error(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert chat(config) == []


def test_the_command_answers_piped_lines(model: Path):
    command = [sys.executable, "-m", "dpojax", "generate", "--model", str(model)]
    done = subprocess.run(
        [*command, "--chat", "--max-new-tokens", "5"],
        input="I saw this film\nI read\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "I"], "--prompt has no effect with --chat"),
        (["--prompts-file", "x"], "--prompts-file has no effect with --chat"),
        (["--output", "x"], "--output has no effect with --chat"),
        (["--num-samples", "2"], "--num-samples has no effect with --chat"),
        (["--batch-size", "2"], "--batch-size has no effect with --chat"),
        (["--temperature", "-1"], "temperature is -1; it must not be negative"),
        (["--no-chat", "--system", "x", "--prompt", "I"], "--system has no effect wi"),
    ],
)
def test_a_setting_that_cannot_work_or_take_effect(
    flags: list[str], message: str, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--model", "none", "--chat", *flags])
    printed = capfd.readouterr().err
    assert stopped.value.code == 2
    assert "dpojax: error: " in printed and message in printed


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path):
    directory = write(tmp_path / "model", make_tokenizer())
    with pytest.raises(ValueError, match="model has no chat template; give a model"):
        chat(GenerateConfig(model=str(directory), chat=True))


def test_an_answer_longer_than_the_model_is_refused(config: GenerateConfig):
    with pytest.raises(ValueError, match="512 positions .*; lower --max-new-tokens"):
        chat(replace(config, max_new_tokens=510))


def test_a_template_that_fails_is_refused_before_anything_is_read(tmp_path: Path):
    template = "{{ raise_exception('System role not supported') }}"
    directory = write(tmp_path / "model", with_template(template))
    with pytest.raises(ValueError, match="System role not supported"):
        chat(GenerateConfig(model=str(directory), chat=True, system="x"))
