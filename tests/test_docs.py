"""Documentation runs as it stands: every block of Python, commands by the real parser.

What takes a cloud or a cluster is held to the shell's and YAML's own rules.
"""

import math
import re
import shlex
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml

from dpojax.cli import parse
from dpojax.from_trl.page import as_markdown
from dpojax.from_trl.table import FIELDS
from dpojax.losses.table import OBJECTIVES
from dpojax.user_code import load_names

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text("utf-8") for path in [ROOT / "README.md", *PAGES]}
FENCED = re.compile(
    r"^ *```(?P<language>\w*)\n(?P<block>.*?)^ *```$", re.DOTALL | re.MULTILINE
)
SHELL = ("", "bash")
HOOKS = load_names(ROOT / "docs" / "hooks.py", "hooks")


def blocks(languages: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{name}:{text[: found.start()].count(chr(10)) + 1}")
        for name, text in TEXTS.items()
        for found in FENCED.finditer(text)
        if re.fullmatch(languages, found["language"])
        for block in [found["block"]]
    ]


def commands() -> list[Any]:
    """Whole commands of dpojax; one with … is the beginning of one."""
    found = {}
    for name, text in TEXTS.items():
        shell = (b["block"] for b in FENCED.finditer(text) if b["language"] in SHELL)
        for block in shell:
            for line in block.replace("\\\n", " ").splitlines():
                command = re.match(r"(?:\$ )?dpojax +(\w.*?)(?: +#.*)?$", line)
                if command and "…" not in line and "$" not in command.group(1):
                    found[command.group(1)] = name
    return [pytest.param(command, id=command[:60]) for command in found]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_of_pages_are_python(block: str):
    compile(block, "block", "exec")


@pytest.mark.parametrize(
    "block",
    re.findall(r"```python\n(.*?)```", TEXTS["notebook.md"], re.DOTALL),
    ids=["a loss", "a loop", "a model"],
)
def test_python_blocks_of_the_notebook_run(
    block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "notebook.md", "exec"), {"__name__": "notebook"})


@pytest.mark.parametrize("command", commands())
def test_commands_are_ones_that_the_parser_takes(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: org/model\ndataset_name: org/pairs\n")
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command.replace("recipe.yaml", str(recipe)))
    parse(arguments)


@pytest.mark.parametrize("block", blocks("bash"))
def test_shell_blocks_are_shell(block: str):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_blocks_are_yaml(block: str):
    assert yaml.safe_load(block)


def test_there_are_commands_and_blocks():
    assert len(commands()) > 8 and len(blocks("bash")) >= 4


@pytest.mark.parametrize("name", [path.name for path in PAGES])
def test_what_pages_take_from_elsewhere_is_there(name: str):
    filled = HOOKS["on_page_markdown"](TEXTS[name])
    assert not re.search(r"<!-- (readme|from_trl|objectives)", filled)


def test_plots_are_of_the_losses():
    pytest.importorskip("matplotlib")
    loss_at = load_names(ROOT / "docs" / "plots.py", "plots")["loss_at"]
    value, slope = jax.value_and_grad(partial(loss_at, "dpo", 1.0))(jnp.array(0.0))
    assert float(value) == pytest.approx(math.log(2))
    assert float(slope) == pytest.approx(-0.1 / 2)
    for name in OBJECTIVES:
        assert jnp.isfinite(loss_at(name, 1.0, jnp.array(1.5))), name


def test_the_page_from_trl_has_every_field():
    page = as_markdown()
    assert all(f"| `{name}` |" in page for name in FIELDS)
    assert "<!-- from_trl -->" in TEXTS["from-trl.md"]


def test_the_navigation_names_every_page():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    named = {page for entry in settings["nav"] for page in entry.values()}
    assert named == {path.name for path in PAGES}
