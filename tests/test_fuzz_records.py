"""Random and mutated lines of data: rows that satisfy the layout, or one sentence.

A few hundred here; `pytest -m fuzz` takes tens of thousands.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from fuzzing import (
    as_line,
    check_layout,
    check_sentence,
    check_sight,
    count_used,
    mutated,
    random_value,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import ROWS
from test_packing import as_example, examples
from test_tokenize import make_tokenizer

from dpojax.data.bad_records import BadRecords
from dpojax.data.fields import Kind
from dpojax.data.packing import Example, as_batch, row_length
from dpojax.data.records import load_records
from dpojax.data.tokenize import tokenize_records

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "[{{ m['role'] }}]{{ m['content'] | trim }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endif %}"
    "</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZER = make_tokenizer("<s> $A", TEMPLATE)
KINDS: tuple[Kind, ...] = ("single", "pair", "judged", "ranked")
GOOD = [row for row, *_ in ROWS.values()]


def random_lines(random: Random) -> tuple[list[bytes], Kind]:
    """One to three lines, most of them near a row of a format of that kind."""
    kind = random.choice(KINDS)
    near = [row for row, found, *_ in ROWS.values() if found == kind]
    lines = []
    for _ in range(random.randrange(1, 4)):
        value: Any = random.choice(near)
        if random.random() < 0.03:
            value = random_value(random)
        for _ in range(random.choice((0, 0, 1, 1, 2))):
            value = mutated(value, random, random_value)
        if isinstance(value, dict) and random.random() < 0.1:
            column = random.choice(("system", "tools", "weight", "margin", "history"))
            value = value | {column: random_value(random)}
        lines.append(as_line(value, random))
    return lines, kind


def use_lines(path: Path, random: Random) -> bool:
    """Whether rows are made of such lines; otherwise one sentence refuses them."""
    lines, fitting = random_lines(random)
    path.write_bytes(b"\n".join(lines))
    kind = fitting if random.random() < 0.8 else random.choice(KINDS)
    bad = BadRecords() if random.random() < 0.5 else None
    reading: Any = {
        "pairs_from": random.choice((*["best_worst"] * 8, "all", "rso")),
        "needs_scores": random.random() < 0.1,
    }
    tokenizing: Any = {
        "max_length": random.choice((4, 16, *[1024] * 4)),
        "too_long": random.choice((*["truncate"] * 4, "drop")),
        "turns": random.choice((*["all"] * 4, "assistant")),
    }
    try:
        records, _ = load_records(
            [str(path)], split="train", kind=kind, test_size=0, bad=bad, **reading
        )
        found, _ = tokenize_records(records, TOKENIZER, bad=bad, **tokenizing)
    except ValueError as error:
        check_sentence(error)
        return False
    check_layout(found)
    return True


@given(st.integers(0, 2**62))
@settings(max_examples=1000)
def test_a_random_line_gives_rows_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, seed: int
):
    random = Random(seed)
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    use_lines(path, random)


@pytest.mark.fuzz
def test_of_very_many_lines_each_gives_rows_or_one_sentence(tmp_path: Path):
    path = tmp_path / "fuzz.jsonl"
    num_used, number = count_used(lambda random: use_lines(path, random))
    print(f"{number} files of lines: {num_used} gave rows, the others one sentence.")
    assert 0.1 < num_used / number < 0.9


@pytest.mark.fuzz
def test_of_lines_that_follow_the_code_each_gives_a_record_or_one_sentence(
    tmp_path: Path,
):
    """By atheris, which mutates bytes towards code that was not run yet."""
    pytest.importorskip("atheris")
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for number, row in enumerate(GOOD):
        (seeds / str(number)).write_text(json.dumps(row))
    number = int(os.environ.get("DPOJAX_FUZZ", 100_000))
    script = str(Path(__file__).with_name("fuzz_lines.py"))
    command = [sys.executable, script, f"-runs={number}", "-max_len=4096", str(seeds)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    print(done.stderr[-300:])
    assert done.returncode == 0, done.stderr[-3000:]


@given(st.lists(examples, min_size=1, max_size=3))
@settings(max_examples=60)
def test_no_token_sees_another_example_or_another_completion(row: list[Example]):
    batch = as_batch([row], length=96, num_slots=3, num_completions=3)
    check_layout(row)
    check_sight(batch, 0, row)


def test_the_checks_find_a_token_that_is_lost_or_sees_another():
    row = [as_example([1, 2], [3, 4], [5]), as_example([6], [7])]
    batch = as_batch([row], length=sum(map(row_length, row)), num_slots=2)
    check_sight(batch, 0, row)
    merged = batch._replace(branch=np.minimum(batch.branch, 1))
    with pytest.raises(AssertionError):
        check_sight(merged, 0, row)
    with pytest.raises(AssertionError):
        check_layout([row[0]._replace(weight=0.0)])
