"""Accuracy over prompts, and paired bootstrap intervals. Knows no rule's meaning."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from instructions import RULES, variants
from jaxtyping import Float

MEASURES = ("prompt strict", "instruction strict", "prompt loose", "instruction loose")
RESAMPLES = 10_000


class Followed(NamedTuple):
    """Which instructions of a prompt a response followed."""

    strict: list[bool]
    loose: list[bool]


def judge(row: Mapping[str, Any], response: str) -> Followed:
    """Asks the rules of a prompt's instructions; an empty response follows none.

    Args:
      row: of the prompts' file.
      response: the completion.
    """
    strict, loose = [], []
    for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        if name not in RULES:
            raise ValueError(
                f"There is no rule {name!r}; there are {', '.join(RULES)}."
            )
        settings = {key: value for key, value in given.items() if value is not None}
        strict.append(_follows(name, settings, response))
        loose.append(any(_follows(name, settings, some) for some in variants(response)))
    return Followed(strict, loose)


def _follows(name: str, settings: Mapping[str, Any], text: str) -> bool:
    return bool(text.strip()) and RULES[name](text, **settings)


class Counts(NamedTuple):
    """What accuracy is made of: per prompt, how many were followed, of how many."""

    followed: Float[np.ndarray, "measures prompts"]
    asked: Float[np.ndarray, "measures prompts"]


def count(judged: Sequence[Followed]) -> Counts:
    """One row for each of `MEASURES`."""
    num = np.array([len(some.strict) for some in judged], float)
    ones = np.ones(len(judged))
    rows = []
    for flags in ([some.strict for some in judged], [some.loose for some in judged]):
        rows += [[all(some) for some in flags], [sum(some) for some in flags]]
    return Counts(np.array(rows, float), np.array([ones, num, ones, num]))


def accuracy(counts: Counts) -> Float[np.ndarray, " measures"]:
    """The share that was followed, by each measure."""
    return counts.followed.sum(1) / counts.asked.sum(1)


def difference_interval(
    one: Counts, other: Counts, seed: int = 0
) -> Float[np.ndarray, "bounds measures"]:
    """95 % bounds of `accuracy(other) - accuracy(one)`, by the percentile bootstrap.

    Prompts are drawn with replacement, and both policies are judged on the same draw,
    so that what makes a prompt hard for both cancels.
    """
    num_prompts = one.asked.shape[1]
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(
        num_prompts, np.full(num_prompts, 1 / num_prompts), size=RESAMPLES
    )
    gained = (other.followed - one.followed) @ drawn.T
    return np.quantile(gained / (one.asked @ drawn.T), (0.025, 0.975), axis=1)
