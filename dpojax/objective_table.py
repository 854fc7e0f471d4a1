"""The table of objectives as text: what `dpojax losses` prints and the README holds."""

from dpojax.losses.make import MODIFIERS, Setting, defaults_of
from dpojax.losses.objective import Objective
from dpojax.losses.table import MIXTURES, OBJECTIVES

HEADER = (
    "loss",
    "formula",
    "takes",
    "needs",
    "per token",
    "settings",
    "learning rate",
    "source",
)

SYMBOLS = (
    "p is log pi, d = p - log pi_ref, n the length, r = beta d, h = r_w - r_l, s the "
    "sigmoid, ls its logarithm, w the chosen and l the rejected completion."
)
LEGEND = (
    f"{SYMBOLS} pair: "
    "chosen and rejected; judged: one completion and its label; ranked: K completions "
    "and their scores; single: one completion. Losses of pairs also take "
    f"{', '.join(MODIFIERS)} where the theory allows."
)


def table_rows() -> list[tuple[str, ...]]:
    """One row for each objective, then one for each mixture that has a name."""
    rows = [_row(name, objective) for name, objective in OBJECTIVES.items()]
    for name, mixture in MIXTURES.items():
        settings = ", ".join(f"{k} {_figure(v)}" for k, v in mixture.settings.items())
        rows.append((name, mixture.terms, "pair", "", "", settings, "", mixture.source))
    return rows


def as_lines() -> str:
    """The table for a terminal: each objective's name and formula, then the rest."""
    lines = []
    for name, formula, kind, needs, per_token, settings, rate, source in table_rows():
        about = (
            f"{kind} + {needs}" if needs else kind,
            "averaged per token" if per_token else "",
            settings,
            f"learning rate {rate}" if rate else "",
            source,
        )
        lines += [f"{name:18} {formula}", f"{'':18} {'; '.join(filter(None, about))}"]
    return "\n".join([*lines, "", LEGEND])


def as_markdown() -> str:
    """The table in Markdown."""
    lines = [HEADER, tuple("---" for _ in HEADER), *map(_marked, table_rows())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(name: str, objective: Objective) -> tuple[str, ...]:
    settings = (f"{k} {_figure(v)}" for k, v in defaults_of(objective).items())
    return (
        name,
        objective.formula,
        objective.kind,
        ", ".join(need.replace("_", " ") for need in objective.needs),
        "yes" if objective.averages else "",
        ", ".join(settings),
        f"{objective.learning_rate:g}",
        objective.source,
    )


def _marked(cells: tuple[str, ...]) -> tuple[str, ...]:
    return f"`{cells[0]}`", f"`{cells[1]}`", *cells[2:]


def _figure(value: Setting) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "yes" if value is True else str(value)
