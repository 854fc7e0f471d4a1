"""A step that is not finite: computed once more, explained, and what a report needs.

    <run>/nan/step-7/report.json         where it began, the examples, sizes, versions
    <run>/nan/step-7/batch.safetensors   the batch as the step saw it

This file knows no loop.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from dpojax.batch import Batch
from dpojax.config import TrainConfig
from dpojax.data.packing import Example
from dpojax.data.plan import Rows
from dpojax.data.tokenize import Tokenizer
from dpojax.examination import Findings
from dpojax.origin import Origin, find_origin, stage_names
from dpojax.processes import only_first
from dpojax.provenance import made_by
from dpojax.sharding import Placement
from dpojax.step_log import NotFinite
from dpojax.train_step import TrainState
from dpojax.training import Training
from dpojax.whole_files import whole_directory

_NAMED = 5  # examples that a sentence names, at most


class Case(NamedTuple):
    """What a step was given."""

    batch: Batch  # on the host, whole
    rows: Rows  # which examples are in the slots of each row
    examples: Sequence[Example]  # of the training data
    tokenizer: Tokenizer
    config: TrainConfig
    directory: Path  # of the run


def explain(
    error: NotFinite,
    case: Case,
    state: TrainState,
    training: Training,
    placement: Placement,
) -> FloatingPointError:
    """The error with where it began, and in which examples; saves the rest.

    Args:
      error: names the step.
      case: what the step was given besides the state.
      state: as it was before the step, but for its number.
      training: whose step it was.
      placement: how rows reach the devices.
    """

    def examine(batch: Batch) -> Findings:
        placed, step = placement.put(batch), np.int32(error.step - 1)
        found = training.examine(state, step, training.frozen, placed)
        return jax.tree.map(np.asarray, found)

    try:
        found = examine(case.batch)
        origin = find_origin(found)
        clause = _examples(origin, case.rows)
        if origin.slots is None:
            clause = _alone(find_row(examine, case.batch), case.rows)
    except jax.errors.JaxRuntimeError as reason:
        first = str(reason).splitlines()[0]
        return FloatingPointError(f"{error} Where it began was not found: {first}")
    where = case.directory / "nan" / f"step-{error.step}"
    sentence = f"{error} It began in {origin.place}{clause}"
    try:
        _write(where, sentence, case, found, origin)
    except OSError as reason:  # a full disk must not hide what was found
        return FloatingPointError(f"{sentence}; a report was not written: {reason}.")
    return FloatingPointError(f"{sentence}; what a report needs is in {where}.")


def find_row(examine: Callable[[Batch], Findings], batch: Batch) -> int | None:
    """A row of which alone the gradient is not finite; None where it takes several.

    Of a gradient it cannot be said which examples it is of. So the batch is filled with
    copies of half of its rows, and of half of these.
    """
    every = np.arange(len(batch.tokens))

    def is_bad(rows: np.ndarray) -> bool:
        filled = np.resize(rows, every.shape)
        copies = jax.tree.map(lambda array: array[filled], batch)
        return not np.isfinite(examine(copies).gradient_norm)

    rows = every
    while len(rows) > 1:
        halves = np.array_split(rows, 2)
        bad = next((half for half in halves if is_bad(half)), None)
        if bad is None:
            return None
        rows = bad
    return int(rows[0]) if is_bad(rows) else None


def _alone(row: int | None, rows: Rows) -> str:
    """A clause that names the training examples of a row, counted from 0."""
    if row is None:
        return ""
    numbers = ", ".join(map(str, sorted(rows[row])))
    return f", which the training examples {numbers} (from 0) alone bring about"


def _examples(origin: Origin, rows: Rows) -> str:
    """A clause that names training examples, counted from 0."""
    if origin.slots is None:
        return ""
    numbers = sorted(_affected(origin, rows))
    every = sum(map(len, rows))
    if len(numbers) == every > 1:
        return f", in all {every} examples of the batch"
    shown = ", ".join(map(str, numbers[:_NAMED]))
    more = len(numbers) - _NAMED
    others = f" and {more} more" if more > 0 else ""
    return f", in the training examples {shown}{others} (from 0)"


def _affected(origin: Origin, rows: Rows) -> list[int]:
    assert origin.slots is not None
    return [
        number
        for row, numbers in enumerate(rows)
        for slot, number in enumerate(numbers)
        if origin.slots[row, slot]
    ]


@only_first
def _write(
    where: Path, sentence: str, case: Case, found: Findings, origin: Origin
) -> None:
    with whole_directory(where) as directory:
        report = _report(sentence, case, found, origin)
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        (directory / "report.json").write_text(text + "\n", encoding="utf-8")
        arrays = {k: v for k, v in case.batch._asdict().items() if v is not None}
        save_file(arrays, directory / "batch.safetensors")


def _report(
    sentence: str, case: Case, found: Findings, origin: Origin
) -> dict[str, Any]:
    """Everything that JSON can hold, the examples that are affected first."""
    affected = set() if origin.slots is None else set(_affected(origin, case.rows))
    places = [
        (number, row, slot)
        for row, numbers in enumerate(case.rows)
        for slot, number in enumerate(numbers)
    ]
    examples = [
        {"began here": number in affected, "number": number, "row": row, "slot": slot}
        | _texts(case.examples[number], case.tokenizer)
        | _numbers(found, row, slot)
        for number, row, slot in places
    ]
    examples.sort(key=lambda example: not example["began here"])
    names = stage_names(found.hidden.shape[-1])
    return {
        "message": sentence,
        **made_by(case.config),
        "largest hidden states": {
            "policy": _by_stage(names, found.hidden),
            "reference": _by_stage(names, found.reference_hidden),
        },
        "largest weights": _as_json(found.weights),
        "largest weights of the reference": _as_json(found.reference_weights),
        "largest gradients": _as_json(found.gradient),
        "norm of the gradient": _as_json(found.gradient_norm),
        "examples": examples,
    }


def _texts(example: Example, tokenizer: Tokenizer) -> dict[str, Any]:
    completions = [tokenizer.decode(one.tolist()) for one in example.completions]
    prompt = tokenizer.decode(example.prompt.tolist())
    return {"prompt": prompt, "completions": completions}


def _numbers(found: Findings, row: int, slot: int) -> dict[str, Any]:
    sizes = {
        "largest log-probability": found.log_probs,
        "largest log-probability of the reference": found.reference_log_probs,
        "loss": found.losses,
        "largest derivative of the loss": found.slopes,
    }
    return {
        name: None if size is None else _as_json(size[row, slot])
        for name, size in sizes.items()
    }


def _by_stage(names: list[str], hidden: Any) -> dict[str, Any] | None:
    if hidden is None:
        return None
    largest = hidden.max((0, 1))
    return dict(zip(names, map(_as_json, largest), strict=True))


def _as_json(value: Any) -> Any:
    """Sizes as JSON has them, which knows no infinity."""
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, np.ndarray) and value.ndim:
        return [_as_json(part) for part in value]
    number = float(value)
    return number if math.isfinite(number) else "not finite"
