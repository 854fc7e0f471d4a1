"""What a batch's scores and outcomes say, as sums: TRL's metrics for every kind.

Of pairs the chosen and the rejected completion; of judged completions the desirable and
the undesirable ones; of rankings the best and the worst of each list. This file knows
no model.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpojax import metrics
from dpojax.losses.make import Loss
from dpojax.losses.scores import Outcome, Scores
from dpojax.metrics import Sums


class Side(NamedTuple):
    """The completions that are preferred, or those that are not."""

    scores: Scores
    reward: Float[Array, "*batch"] | None
    where: Bool[Array, "*batch"]


def outcome_sums(
    loss: Loss,
    outcomes: Mapping[str, Outcome],
    candidates: Scores,
    weight: Float[Array, "*batch"],
) -> Sums:
    """Every metric of a batch but its gradient.

    Args:
      loss: the objective.
      outcomes: what it said, by term.
      candidates: scores ``[*batch, completions]``.
      weight: how much each example counts; 0 where there is none.
    """
    tokens = candidates.length[..., 0]
    whole = metrics.loss_sums(*loss.total(outcomes), weight, tokens)
    sums: Sums = {"loss": whole}
    for term in loss.terms:
        outcome = outcomes[term.name]
        if len(loss.terms) > 1:
            sums[f"loss/{term.name}"] = metrics.loss_sums(
                outcome.loss, outcome.token_loss, weight, tokens
            )
        for name, value in (outcome.logged or {}).items():
            sums[name] = metrics.Ratio(value, jnp.ones(()))
    rewards = next(filter(None, (one.rewards for one in outcomes.values())), None)
    live = candidates.present[..., 0]
    sides = _sides(loss, candidates, rewards or (), live)
    for name, side in sides.items():
        sums |= _side_sums(name, side)
        if "reward_head" in loss.needs:  # which gives rewards, no probabilities
            del sums[f"logps/{name}"], sums[f"logps/{name}_per_token"]
    if loss.kind in ("pair", "ranked"):
        sums |= _pair_sums(sides["chosen"], sides["rejected"])
    elif loss.kind == "judged":
        sums["rewards/margins"] = metrics.MeanDifference(
            sums["rewards/chosen"], sums["rewards/rejected"]
        )
    if loss.kind == "ranked" and rewards is not None:
        sums["rewards/rank_accuracies"] = _rank_accuracy(candidates, rewards[0], live)
    return sums


def example_figures(
    loss: Loss, outcomes: Mapping[str, Outcome], candidates: Scores
) -> Sums:
    """What each example says for itself, ``[*batch]``; nothing without rewards.

    Rewards and lengths of the preferred and the other completion; of judged completions
    reward, length and label.
    """
    rewards = next(filter(None, (one.rewards for one in outcomes.values())), None)
    if rewards is None or loss.kind == "single":
        return {}
    if loss.kind == "judged":
        return {
            "reward": rewards[0],
            "length": candidates.length[..., 0],
            "label": candidates.rating[..., 0],
        }
    sides = _sides(loss, candidates, rewards, candidates.present[..., 0])
    return {f"{name}_reward": side.reward for name, side in sides.items()} | {
        f"{name}_length": side.scores.length for name, side in sides.items()
    }


def token_metric_sums(loss: Loss, sums: Mapping[str, Array], length: Array) -> Sums:
    """Means over tokens, from sums over completions ``[rows, slots, completions]``.

    As in TRL, a pair's ``mean_token_accuracy`` is that of its chosen completion.
    """

    def mean(name: str, total: Array) -> metrics.Ratio:
        one = name == "mean_token_accuracy" and loss.kind == "pair"
        total, count = (x[..., :1] if one else x for x in (total, length))
        return metrics.Ratio(jnp.sum(total), jnp.sum(count).astype(total.dtype))

    return {name: mean(name, total) for name, total in sums.items()}


def _sides(
    loss: Loss, candidates: Scores, rewards: tuple[Array, ...], live: Array
) -> dict[str, Side]:
    def of(index: int | Array, reward: Array | None, where: Array) -> Side:
        return Side(_take(candidates, index), reward, where)

    if loss.kind == "single":
        return {"chosen": of(0, None, live)}
    if loss.kind == "pair":
        chosen, rejected = rewards if rewards else (None, None)
        return {"chosen": of(0, chosen, live), "rejected": of(1, rejected, live)}
    if loss.kind == "judged":
        good = candidates.rating[..., 0] > 0.5
        return {
            "chosen": of(0, rewards[0], live & good),
            "rejected": of(0, rewards[0], live & ~good),
        }
    best = jnp.argmax(jnp.where(candidates.present, candidates.rating, -jnp.inf), -1)
    worst = jnp.argmin(jnp.where(candidates.present, candidates.rating, jnp.inf), -1)
    return {
        "chosen": of(best, _at(rewards[0], best), live),
        "rejected": of(worst, _at(rewards[0], worst), live),
    }


def _side_sums(name: str, side: Side) -> Sums:
    scores = side.scores
    sums = metrics.completion_sums(name, scores.policy, scores.length, side.where)
    if side.reward is not None:
        sums[f"rewards/{name}"] = metrics.moments(side.reward, side.where)
    if scores.reference is not None:
        sums[f"logratios/{name}"] = metrics.moments(scores.log_ratio, side.where)
        if name == "chosen":
            falls = (scores.log_ratio < 0).astype(jnp.float32)
            sums["logratios/chosen_negative"] = metrics.moments(falls, side.where)
    return sums


def _pair_sums(chosen: Side, rejected: Side) -> Sums:
    if chosen.reward is None or rejected.reward is None:
        return {}
    return metrics.margin_sums(
        chosen.reward - rejected.reward,
        chosen.scores.length - rejected.scores.length,
        chosen.where,
    )


def _rank_accuracy(candidates: Scores, reward: Array, live: Array) -> metrics.Moments:
    """Of each list, the share of its differently scored pairs that rewards order so."""
    score, present = candidates.rating, candidates.present
    better = (score[..., :, None] > score[..., None, :]) & (
        present[..., :, None] & present[..., None, :]
    )
    right = (1 + jnp.sign(reward[..., :, None] - reward[..., None, :])) / 2
    count = jnp.sum(better, axis=(-2, -1))
    share = jnp.sum(jnp.where(better, right, 0.0), axis=(-2, -1))
    return metrics.moments(share / jnp.maximum(count, 1), live & (count > 0))


def _take(candidates: Scores, index: int | Array) -> Scores:
    return jax.tree.map(lambda array: _at(array, index), candidates)


def _at(array: Array, index: int | Array) -> Array:
    if isinstance(index, int):
        return array[..., index]
    return jnp.take_along_axis(array, index[..., None], axis=-1)[..., 0]
