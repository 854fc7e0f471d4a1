"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

from dpojax.objective_table import as_markdown

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_every_python_block_runs(block: str):
    exec(compile(block, str(README), "exec"), {})


def test_there_are_python_blocks():
    assert len(BLOCKS) == 3


def test_the_table_of_objectives_is_the_one_that_the_command_prints():
    table = re.search(
        r"<!-- dpojax losses --markdown -->\n(.*?)\n<!-- end -->", TEXT, re.S
    )
    assert table is not None and table.group(1) == as_markdown()
