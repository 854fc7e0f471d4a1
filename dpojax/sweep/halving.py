"""Successive halving: every run gets a little, the better half gets more, and so on.

It ends when what is left fills one program, where dropping a run saves nothing. Runs
of different losses and betas are compared by what means the same for all of them, the
held-out accuracy; seeds of a combination stay or go together, by their mean. This file
knows no model.

References:
  Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter
  Optimization, 2016, arXiv:1502.07943, algorithm 1.
"""

import math
from collections.abc import Sequence
from typing import Any

from dpojax.metrics_file import read_lines
from dpojax.sweep.grouping import Trial

_SCORE, _TIES = "rewards/accuracies", "rewards/margins"


def rungs(num_combinations: int, width: int, num_steps: int, every: int) -> list[int]:
    """The steps after which the worse half is dropped.

    The last is half of the run, the one before it half of that; each is rounded up to
    an evaluation.

    Args:
      num_combinations: that begin.
      width: combinations that are trained at one time.
      num_steps: of a run.
      every: steps between evaluations.

    Raises:
      ValueError: where evaluations are too far apart for so many rungs.
    """
    num_rungs = max(0, math.ceil(math.log2(num_combinations / width)))
    exact = [num_steps / 2 ** (num_rungs - rung) for rung in range(num_rungs)]
    found = [every * math.ceil(step / every) for step in exact]
    if len(set(found)) < num_rungs or any(step >= num_steps for step in found):
        raise ValueError(
            f"--search halving compares runs after about "
            f"{', '.join(f'{step:.0f}' for step in exact)} of {num_steps} steps, and "
            f"evaluations are every {every}; lower --evaluate-every."
        )
    return found


def better_half(trials: Sequence[Trial], step: int) -> list[Trial]:
    """The runs of the combinations that are ahead after a step, in their old order."""
    by_combination: dict[Any, list[Trial]] = {}
    for trial in trials:
        by_combination.setdefault(_combination(trial), []).append(trial)
    scores = {
        key: _mean([_score(trial, step) for trial in some])
        for key, some in by_combination.items()
    }
    order = sorted(by_combination, key=lambda key: scores[key], reverse=True)
    kept = set(order[: math.ceil(len(order) / 2)])
    return [trial for trial in trials if _combination(trial) in kept]


def _combination(trial: Trial) -> tuple[tuple[str, str], ...]:
    """What a run has in common with those of other seeds."""
    return tuple((k, v) for k, v in trial.changes.items() if k != "seed")


def _score(trial: Trial, step: int) -> tuple[float, float]:
    """Held-out accuracy, then margin; a run without either comes last."""
    lines = read_lines(trial.directory / "metrics.jsonl")
    test = [values for at, split, values in lines if (at, split) == (step, "test")]
    values = test[-1] if test else {}
    return _number(values.get(_SCORE)), _number(values.get(_TIES))


def _number(value: float | None) -> float:
    return -math.inf if value is None else value


def _mean(scores: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(scores) for column in zip(*scores, strict=True))
