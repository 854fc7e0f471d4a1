"""What pages take from elsewhere while they are built, so that nothing is said twice.

``<!-- readme: Heading -->`` is that section of the README; ``<!-- from_trl -->`` the
table of TRL's fields; ``<!-- objectives -->`` every objective with its plot.
"""

import re
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_README = (_HERE.parent / "README.md").read_text("utf-8")


def on_files(files: Any, config: Any) -> Any:
    """Adds a plot for each objective."""
    from mkdocs.structure.files import File

    from dpojax.losses.table import OBJECTIVES
    from dpojax.user_code import load_names

    draw = load_names(_HERE / "plots.py", "plots")["draw"]
    for name in OBJECTIVES:
        files.append(File.generated(config, f"plots/{name}.svg", content=draw(name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills the markers in."""
    return re.sub(r"<!-- ([a-z_]+)(?:: (.+?))? -->", _fill, markdown)


def _fill(marker: re.Match[str]) -> str:
    kind, about = marker.groups()
    if kind == "readme":
        return section(about)
    if kind == "from_trl":
        from dpojax.from_trl.page import as_markdown

        return as_markdown()
    if kind == "objectives":
        return objectives()
    return marker.group()


def section(heading: str) -> str:
    """A section of the README, without its heading; links to files are their names."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", _README, re.M | re.S
    )
    if found is None:
        raise ValueError(f"The README has no section {heading!r}.")
    return re.sub(r"\[([^]]+)\]\((?!http)[^)]+\)", r"\1", found.group(1))


def objectives() -> str:
    """Every objective: formula, settings, source and plot."""
    from dpojax.losses.table import OBJECTIVES
    from dpojax.objective_table import LEGEND, table_rows

    lines = [LEGEND, ""]
    for name, formula, kind, needs, average, settings, rate, source in table_rows():
        about = [f"takes: {kind}", f"needs: {needs}" if needs else ""]
        about += ["averaged per token" if average else "", f"settings: {settings}"]
        about += [f"learning rate {rate}" if rate else "", source]
        lines += [f"## {name}", "", f"`{formula}`", "", "; ".join(filter(None, about))]
        if name in OBJECTIVES:
            lines += ["", f"![loss and gradient of {name}](plots/{name}.svg)"]
        lines.append("")
    return "\n".join(lines)
