"""Scripts by which bash and zsh complete commands, flags and their choices.

tyro writes them; what it does not know is added here: files where it has no word to
offer, the flags that are taken before it reads the others, and what --loss may name,
each term of a sum apart.
"""

import io
from collections.abc import Callable, Iterable
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
  [[ "${COMP_WORDS[COMP_CWORD-1]}" == --loss ]] || return 0
  word="${word#[\\"\\']}" # an opening quote stays as it is
  local name term="${word##*[*+]}"
  for name in LOSSES; do
    [[ "$name" != "$term"* ]] || COMPREPLY+=("${word%"$term"}$name")
  done
}
complete -o filenames -o default -F _dpojax dpojax
""",
    "zsh": """ || _files
case "$words[2]" in
  train | reference | plan | sweep) compadd -- FLAGS ;;
esac
if [[ "$words[CURRENT-1]" == --loss ]]; then
  compset -P '*[*+]'
  compadd -- LOSSES
fi
""",
}


def as_script(
    shell: Shell,
    *,
    flags: Iterable[str],
    losses: Iterable[str],
    cli: Callable[..., object],
) -> str:
    """The script for a shell.

    Args:
      shell: which.
      flags: those that tyro does not know.
      losses: names that may stand after --loss.
      cli: `tyro.cli` of the commands; given arguments, it prints and exits.
    """
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        cli(args=["--tyro-print-completion", shell])
    added = _ADDED[shell].replace("FLAGS", " ".join(flags))
    return printed.getvalue().rstrip() + added.replace("LOSSES", " ".join(losses))
