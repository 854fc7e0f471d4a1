"""Preferences from samples: the exact reward of `dpojax.data.synthetic` labels them.

This file knows neither a grammar nor a model.
"""

from collections.abc import Sequence
from typing import Any

from dpojax.data.synthetic import reward


def rank_completions(
    openings: Sequence[str], completions: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Rankings from samples: completions and their exact rewards.

    Args:
      openings: the prompts.
      completions: for each opening, the completions sampled for it.

    Returns:
      One record per opening, in order: prompt, completions, scores. Openings whose
      completions all earn the same are left out.
    """
    if len(openings) != len(completions):
        raise ValueError(
            f"{len(openings)} openings came with {len(completions)} lists of samples;"
            " give one list for each opening."
        )
    rankings = []
    for opening, samples in zip(openings, completions, strict=True):
        scores = [reward(opening + sample) for sample in samples]
        if len(set(scores)) > 1:
            ranking = {"prompt": opening, "completions": samples, "scores": scores}
            rankings.append(ranking)
    return rankings


def label_pairs(
    openings: Sequence[str], completions: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Preference pairs from samples: the best and the worst completion by reward.

    Takes what `rank_completions` takes.

    Returns:
      One record per opening, in order: prompt, chosen, rejected and their scores.
      Openings whose completions all earn the same are left out.
    """
    pairs = []
    for ranking in rank_completions(openings, completions):
        scores = ranking["scores"]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        pair = {
            "prompt": ranking["prompt"],
            "chosen": ranking["completions"][best],
            "rejected": ranking["completions"][worst],
            "chosen_score": scores[best],
            "rejected_score": scores[worst],
        }
        pairs.append(pair)
    return pairs
