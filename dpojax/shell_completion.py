"""Scripts by which bash and zsh complete commands, flags and their choices.

tyro writes them; what it does not know is added here: files where it has no word to
offer, and the flags that are taken before it reads the others. Knows no command.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from typing import Literal

Shell = Literal["bash", "zsh"]

_ADDED = {
    "bash": """
_dpojax() {
  local word="${COMP_WORDS[COMP_CWORD]}"
  _tyro_dpojax
  [[ -n "${COMPREPLY[*]}" ]] || COMPREPLY=()
  case "${COMP_WORDS[1]}" in
    train | reference | plan | sweep) COMPREPLY+=($(compgen -W "FLAGS" -- "$word")) ;;
  esac
}
complete -o filenames -o default -F _dpojax dpojax
""",
    "zsh": """ || _files
case "$words[2]" in
  train | reference | plan | sweep) compadd -- FLAGS ;;
esac
""",
}


def as_script(shell: Shell, flags: tuple[str, ...], cli: Callable[..., object]) -> str:
    """The script for a shell.

    Args:
      shell: which.
      flags: those that tyro does not know.
      cli: `tyro.cli` of the commands; given arguments, it prints and exits.
    """
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        cli(args=["--tyro-print-completion", shell])
    return printed.getvalue().rstrip() + _ADDED[shell].replace("FLAGS", " ".join(flags))
