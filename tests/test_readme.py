"""What the README shows runs as it stands there."""

import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpojax.data.packing import as_batch
from dpojax.log_probs import completion_log_probs
from dpojax.metrics import summarize
from dpojax.objective_table import as_markdown

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
FIRST_STEPS = [block for block in BLOCKS if "state, sums = train_step(" in block]
OWN_MODELS = [block for block in FIRST_STEPS if "class TinyLM" in block]


def run(block: str) -> dict[str, Any]:
    """The names that a block leaves behind."""
    names: dict[str, Any] = {}
    exec(compile(block, str(README), "exec"), names)
    return names


def library(block: str) -> str:
    """By what a block is told from others."""
    found = re.search(r"from flax import (\w+)|from ([\w.]+)", block)
    assert found is not None
    return found[1] or found[2]


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block not in FIRST_STEPS], ids=library
)
def test_every_other_python_block_runs(block: str):
    run(block)


@pytest.mark.parametrize("block", FIRST_STEPS, ids=library)
def test_every_first_step_starts_at_log_2(block: str):
    sums = jax.device_get(run(block)["sums"])
    assert summarize(sums)["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("block", OWN_MODELS, ids=library)
def test_own_models_see_each_completion_as_if_it_stood_alone(block: str):
    """A pair in one row, and its completions in a row each."""
    names = run(block)
    apply, params = jax.jit(names["apply"]), names["state"].params
    pairs = [example for row in names["rows"] for example in row]

    def log_probs(rows: list) -> np.ndarray:
        batch = as_batch(rows, length=16, num_slots=2)
        hidden, output = apply(params, batch)
        found = completion_log_probs(hidden, output, batch)
        return np.asarray(found)[batch.completion_length > 0]

    together = log_probs([pairs])
    alone = log_probs(
        [
            [example._replace(completions=(completion,))]
            for example in pairs
            for completion in example.completions
        ]
    )
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_there_are_python_blocks():
    assert (len(BLOCKS), len(FIRST_STEPS), len(OWN_MODELS)) == (5, 3, 2)


def test_the_table_of_objectives_is_the_one_that_the_command_prints():
    table = re.search(
        r"<!-- dpojax losses --markdown -->\n(.*?)\n<!-- end -->", TEXT, re.S
    )
    assert table is not None and table.group(1) == as_markdown()
