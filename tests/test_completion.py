"""What bash and zsh complete by the scripts that the command prints, in real shells."""

import io
import os
import pty
import select
import shlex
import shutil
import subprocess
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from dpojax.cli import main


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    found = {}
    for shell in ("bash", "zsh"):
        with redirect_stdout(io.StringIO()) as printed:
            main(["completion", shell])
        found[shell] = printed.getvalue()
    return found


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
    "dpojax train --loss sim": {"simpo", "simnpo"},
    "dpojax eval --loss it": {"iterative_rpo"},
    "dpojax train --loss '0.8*tdpo'": {"0.8*tdpo1", "0.8*tdpo2"},
    "dpojax train --loss 0.8*dpo+0.2*bco_": {"0.8*dpo+0.2*bco_pair"},
    "dpojax train --loss pa": {"pairs.jsonl"},
    "dpojax train --model pa": {"pairs.jsonl"},
    "dpojax train --data pairs.jsonl pa": {"pairs.jsonl"},
    "dpojax export pa": {"pairs.jsonl"},
}


@pytest.mark.parametrize(("line", "expected"), LINES.items(), ids=list(LINES))
def test_bash_completes(
    line: str, expected: set[str], tmp_path: Path, scripts: dict[str, str]
):
    (tmp_path / "pairs.jsonl").touch()
    assert completed_by_bash(scripts["bash"], line, tmp_path) == expected


def test_bash_offers_every_command(tmp_path: Path, scripts: dict[str, str]):
    offered = completed_by_bash(scripts["bash"], "dpojax ", tmp_path)
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
        ("dpojax train --loss simn\t", "simnpo"),
        ("dpojax train --loss 0.8*dpo+0.2*bco_\t", "bco_pair"),
        ("dpojax train --loss pa\t", "pairs.jsonl"),
    ],
)
def test_zsh_completes(typed: str, shown: str, tmp_path: Path, scripts: dict[str, str]):
    (tmp_path / "pairs.jsonl").touch()
    (tmp_path / "_dpojax").write_text(scripts["zsh"])
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
