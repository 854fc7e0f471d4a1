"""What bash and zsh complete by the scripts that the command prints, in real shells."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dpojax.cli import main


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    main(["completion", shell])
    return capsys.readouterr().out


def completed_by_bash(script: str, line: str, directory: Path) -> set[str]:
    """What bash would offer for the last word, its own files included."""
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    after = f"""
complete -p dpojax >&2
COMP_WORDS=({" ".join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}
_dpojax
(( ${{#COMPREPLY[@]}} )) || COMPREPLY=($(compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}"))
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc"],
        input=script + after,
        text=True,
        capture_output=True,
        cwd=directory,
        check=True,
    )
    assert "-o default" in done.stderr and "-F _dpojax dpojax" in done.stderr
    return set(done.stdout.split())


LINES = {
    "dpojax tr": {"train"},
    "dpojax train --loss.bet": {"--loss.beta"},
    "dpojax train --batch": {"--batch-size"},
    "dpojax train --attention fl": {"flash"},
    "dpojax train --track tensorboard wa": {"wandb"},
    "dpojax train --from": {"--from-trl"},
    "dpojax plan --topo": {"--topology"},
    "dpojax train --model pa": {"pairs.jsonl"},
    "dpojax train --data pairs.jsonl pa": {"pairs.jsonl"},
    "dpojax export pa": {"pairs.jsonl"},
}


@pytest.mark.parametrize(("line", "expected"), LINES.items(), ids=list(LINES))
def test_bash_completes(
    line: str, expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "pairs.jsonl").touch()
    assert completed_by_bash(script("bash", capsys), line, tmp_path) == expected


def test_bash_offers_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    offered = completed_by_bash(script("bash", capsys), "dpojax ", tmp_path)
    assert {"train", "eval", "plan", "report", "completion"} <= offered


ZSH = shutil.which("zsh")


@pytest.mark.skipif(ZSH is None, reason="no zsh is installed")
@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("dpojax tr\t", "train"),
        ("dpojax train --loss.bet\t", "--loss.beta"),
        ("dpojax train --attention fl\t", "flash"),
        ("dpojax train --print-c\t", "--print-config"),
        ("dpojax export pa\t", "pairs.jsonl"),
    ],
)
def test_zsh_completes(
    typed: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "pairs.jsonl").touch()
    (tmp_path / "_dpojax").write_text(script("zsh", capsys))
    begin = (
        f"cd {shlex.quote(str(tmp_path))}; fpath=($PWD $fpath); unsetopt beep; "
        "autoload -Uz compinit && compinit -u -D && print ready"
    )
    terminal, inside = pty.openpty()
    assert ZSH is not None
    shell = subprocess.Popen(
        [ZSH, "-d", "-i"],
        **dict.fromkeys(("stdin", "stdout", "stderr"), inside),
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(inside)
    try:
        os.write(terminal, f"{begin}\n".encode())
        assert "ready" in said(terminal, "\nready")
        os.write(terminal, typed.encode())
        assert shown in said(terminal, shown)
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)


def said(terminal: int, awaited: str) -> str:
    """What comes until the awaited words do, within ten seconds."""
    text, end = "", time.monotonic() + 10
    while awaited not in text and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 65536).decode(errors="replace").replace("\r", "")
    return text
