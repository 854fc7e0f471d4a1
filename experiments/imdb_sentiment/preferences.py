"""Preference pairs from scored samples, and best-of-N from them. Knows no model."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float


def make_pairs(
    prompt: str, completions: Sequence[str], scores: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Every two completions of a prompt; the one of the higher score is chosen.

    Labels have no noise: the paper's come from the ground-truth reward as well.
    Completions of one score, or of one text, make no pair.
    """
    for one, other in combinations(range(len(completions)), 2):
        if scores[one] == scores[other] or completions[one] == completions[other]:
            continue
        best, worst = (one, other) if scores[one] > scores[other] else (other, one)
        yield {
            "prompt": prompt,
            "chosen": completions[best],
            "rejected": completions[worst],
            "chosen_score": scores[best],
            "rejected_score": scores[worst],
        }


def best_of(
    scores: Float[np.ndarray, "prompts samples"], number: int
) -> Float[np.ndarray, " prompts"]:
    """The highest score among the first `number` samples of each prompt."""
    return scores[:, :number].max(axis=1)


def best_of_kl(number: int) -> float:
    """The bound log N - (N-1)/N on best-of-N's sequence-level KL, in nats.

    It is met where no two samples score the same: Beirami et al. 2024,
    arXiv:2401.01879.
    """
    return math.log(number) - (number - 1) / number
