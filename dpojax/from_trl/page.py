"""The table of fields as Markdown, for the page "From TRL"."""

from dpojax.from_trl.defaults import DEFAULTS
from dpojax.from_trl.table import FIELDS, Row

_TITLES = {
    "mapped": "Taken over",
    "reported": "Reported: they change no result",
    "refused": "Refused, where they ask for anything",
}


def as_markdown() -> str:
    """One table for each outcome; fields of every trainer, alphabetically."""
    lines = []
    for outcome, title in _TITLES.items():
        lines += [f"### {title}", "", "| field | of | here |", "|---|---|---|"]
        lines += [
            f"| `{name}` | {_trainers(name)} | {_text(row)} |"
            for name, row in sorted(FIELDS.items())
            if row.outcome == outcome
        ]
        lines.append("")
    return "\n".join(lines)


def _trainers(name: str) -> str:
    has = [trainer for trainer, own in DEFAULTS.items() if name in own]
    return "all" if len(has) in (0, len(DEFAULTS)) else ", ".join(has)


def _text(row: Row) -> str:
    settled = " or ".join(f"`{flag}`" for flag in row.settled_by)
    return f"{row.text}; {settled} settles it" if settled else row.text
