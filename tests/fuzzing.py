"""Random and mutated JSON, and what must hold of whatever is made of it.

Knows no file and no format: the tests bring the values that are mutated.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import jax.numpy as jnp
import numpy as np

import dpojax
from dpojax.batch import Batch
from dpojax.data.packing import Example, as_batch, row_length
from dpojax.models.attention import visible

_PACKAGE = str(Path(dpojax.__file__).parent)
_TEXTS = (
    "", " ", "x", "role", "user", "assistant", "content", "\0", "\ud800", "\udcff",
    "\u2028", "a\nb", "\N{GRINNING FACE}", "Infinity", "1e999", "null", "[]", "{}",
    '{"name": "f"}', "[" * 2000, "<s>", "</s>", "{{ 1 / 0 }}", "../../x", "\u0661", "²",
    "x" * 3000, "\n\nAssistant:", "true", "system", "tool", "human", "gpt",
)  # fmt: skip
_NUMBERS = (
    0, 1, -1, 2, 0.5, 1e308, -1e308, 1e39, 1e-46, 5e-324, 10**30, 10**400, -(10**400),
    2**31, 2**63, float("nan"), float("inf"), -float("inf"), True, False,
)  # fmt: skip


def random_value(random: Random, depth: int = 3) -> Any:
    """Any value that JSON can be parsed to, and halves of surrogate pairs."""
    kind = random.randrange(8 if depth else 5)
    if kind < 2:
        return random.choice(_TEXTS)
    if kind < 4:
        return random.choice(_NUMBERS)
    if kind == 4:
        return None
    count = random.randrange(4)
    if kind == 5:
        return {random.choice(_TEXTS): random_value(random, depth - 1)
                for _ in range(count)}  # fmt: skip
    if kind == 6:
        return [random_value(random, depth - 1) for _ in range(count)]
    nested: Any = random.choice(_NUMBERS)
    for _ in range(random.choice((5, 50, 400, 900))):
        nested = [nested] if random.random() < 0.5 else {"a": nested}
    return nested


def mutated(
    value: Any, random: Random, replacement: Callable[[Random], Any], depth: int = 0
) -> Any:
    """The value with one thing in it replaced, removed, repeated or renamed."""
    holds = isinstance(value, dict | list) and len(value) > 0
    if not holds or (depth and random.random() < 0.3):
        return replacement(random)
    if isinstance(value, dict):
        key = random.choice(sorted(value, key=str))
        others = {name: value[name] for name in value if name != key}
        change = random.randrange(8)
        if change == 0:
            return others
        if change == 1:
            return others | {random.choice([*_TEXTS, key + "s"]): value[key]}
        if change == 2:
            return value | {random.choice(_TEXTS): replacement(random)}
        return value | {key: mutated(value[key], random, replacement, depth + 1)}
    place = random.randrange(len(value))
    change = random.randrange(6)
    if change == 0:
        return value[:place] + value[place + 1 :]
    if change == 1:
        return [*value, value[place]]
    new = mutated(value[place], random, replacement, depth + 1)
    return [*value[:place], new, *value[place + 1 :]]


def as_line(value: Any, random: Random) -> bytes:
    """JSON of a value, at times damaged."""
    line = json.dumps(value).replace("\n", " ").encode()
    if random.random() < 0.05 and line:
        place = random.randrange(len(line))
        damage = bytes(random.randrange(256) for _ in range(random.randrange(3)))
        line = line[:place] + damage + line[place + random.randrange(2) :]
    return line.replace(b"\n", b" ")


def count_used(use: Callable[[Random], bool]) -> tuple[int, int]:
    """Of very many tries, how many are of use, and how many there are."""
    number = int(os.environ.get("DPOJAX_FUZZ", 100_000))
    num_used = 0
    for seed in range(number):
        try:
            num_used += use(Random(seed))
        except BaseException:
            print(f"The seed is {seed}.")
            raise
    return num_used, number


def check_sentence(error: ValueError) -> None:
    """One sentence for a person, by dpojax itself."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    assert traceback is not None
    path = traceback.tb_frame.f_code.co_filename
    assert path.startswith(_PACKAGE), (path, error)
    message = str(error)
    assert message and message.isprintable() and len(message) < 1500, message
    message.encode("utf-8")


def check_layout(examples: Sequence[Example]) -> None:
    """Rows of these examples satisfy what `dpojax.batch` says of them."""
    rows = [examples[start : start + 3] for start in range(0, len(examples), 3)]
    length = max(sum(map(row_length, row)) for row in rows)
    most = max(len(example.completions) for example in examples)
    batch = as_batch(rows, length=length, num_slots=3, num_completions=most)
    assert np.isfinite(batch.score).all() and np.isfinite(batch.weight).all()
    assert (batch.weight > 0).tolist() == batch.live.tolist()
    # What is scored is scored once, and nothing else is.
    assert batch.completion_length.sum() == np.count_nonzero(batch.scored)
    for row, some in enumerate(rows):
        used = sum(map(row_length, some))
        assert (batch.example[row, :used] > 0).all()
        assert not any(array[row, used:].any() for array in batch[:5])
        for slot, example in enumerate(some):
            _check_example(batch, row, slot, example)


def _check_example(batch: Batch, row: int, slot: int, example: Example) -> None:
    """Each token of each completion is a label once, after those before it."""
    mine = batch.example[row] == slot + 1
    prompt = example.prompt.tolist()
    assert prompt
    for branch, tokens in enumerate(example.completions, start=1):
        assert len(tokens)
        mask = np.ones(len(tokens), bool)
        if example.masks is not None:
            mask = example.masks[branch - 1]
        here = mine & (batch.branch[row] == branch)
        assert batch.labels[row, here].tolist() == np.where(mask, tokens, -1).tolist()
        assert batch.completion_length[row, slot, branch - 1] == mask.sum() > 0
        seen = mine & ((batch.branch[row] == 0) | here)
        whole = prompt + tokens.tolist()
        assert batch.tokens[row, seen].tolist() == whole[:-1]
        assert batch.position[row, seen].tolist() == list(range(len(whole) - 1))


def check_sight(batch: Batch, row: int, examples: Sequence[Example]) -> None:
    """What predicts a token sees its prompt, its own beginning, and nothing else."""
    seen = np.asarray(
        visible(
            jnp.asarray(batch.example), jnp.asarray(batch.branch), batch.tokens.shape[1]
        )
    )[row]
    for place in np.flatnonzero(batch.branch[row]):
        slot, branch, position = (
            int(array[row, place])
            for array in (batch.example, batch.branch, batch.position)
        )
        example = examples[slot - 1]
        completion = example.completions[branch - 1]
        before = position - len(example.prompt) + 1
        expected = [*example.prompt, *completion[:before]]
        assert batch.tokens[row, seen[place]].tolist() == [int(t) for t in expected]
