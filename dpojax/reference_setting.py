"""The reference by its settings: which model, computed when, and whether it moves.

This file knows neither the loop nor the model.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from dpojax.config import MovingConfig, TrainConfig
from dpojax.losses.make import Loss
from dpojax.reference import Movement, bema, tr_dpo

_SIDES = ("chosen", "rejected")


class NamedReference(NamedTuple):
    """What the setting `reference` says."""

    model: str | None  # None: the policy as it is at step 0
    is_precomputed: bool


def named_reference(setting: str | None) -> NamedReference:
    """Takes ``MODEL``, ``precomputed`` or ``precomputed:MODEL`` apart.

    Raises:
      ValueError: if no model follows the colon.
    """
    before, colon, after = (setting or "").partition(":")
    if before != "precomputed":
        return NamedReference(setting, False)
    if colon and not after:
        raise ValueError(
            f"{setting!r} names no model; write precomputed:MODEL or, for the policy "
            "as it is at step 0, precomputed."
        )
    return NamedReference(after or None, True)


def why_not_equal(config: TrainConfig, values: Mapping[str, float]) -> str | None:
    """Why the policy is not the reference at step 0; None where it is, or has none.

    Args:
      config: the settings.
      values: an evaluation at step 0.
    """
    sides = [side for side in _SIDES if f"logratios/{side}" in values]
    means = [values[f"logratios/{side}"] for side in sides]
    errors = [values[f"logratios/{side}_se"] for side in sides]
    # Of a single example, a mean has no standard error.
    if not any(means) and all(error == 0 or math.isnan(error) for error in errors):
        return None
    model, is_precomputed = named_reference(config.reference)
    if model is not None and model != config.model:
        reason = f"the reference is {model}"
    elif is_precomputed:
        reason = "its log-probabilities were computed in other rows, and are rounded"
    elif config.lora.kind == "dora":
        reason = "the norms that DoRA divides by are rounded"
    else:
        reason = (
            "no setting accounts for it; look for damage in the weights, or devices "
            "that do not compute the same twice"
        )
    told = " and ".join(
        f"{values[f'logratios/{side}']:.3g} of {values[f'logps/{side}']:.5g} ({side})"
        for side in sides
    )
    return (
        f"At step 0 the policy is not equal to the reference: {reason}. Its mean "
        f"log-ratios are {told}, nats."
    )


def make_movement(config: MovingConfig, loss: Loss) -> Movement | None:
    """How the reference follows the policy, or None if it stays.

    Raises:
      ValueError: for a setting that its kind does not have, or a loss without a
        reference.
    """
    given = {
        name: value
        for name, value in vars(config).items()
        if name != "kind" and value is not None
    }
    if config.kind == "none":
        if given:
            raise ValueError(
                f"--moving.{next(iter(given))} has no effect on a reference that "
                "stays; choose --moving tr_dpo or bema."
            )
        return None
    if "reference" not in loss.needs:
        raise ValueError(f"The loss {loss.name!r} uses no reference that could move.")
    known = {
        "tr_dpo": ("alpha", "every"),
        "bema": ("ema_power", "bias_power", "lag", "every"),
    }[config.kind]
    for name in given:
        if name not in known:
            raise ValueError(
                f"The moving reference {config.kind} has no setting {name!r}; "
                f"it has {', '.join(known)}."
            )
    return {"tr_dpo": tr_dpo, "bema": bema}[config.kind](**given)


def check_reference(config: TrainConfig, loss: Loss) -> None:
    """Refuses a reference that the loss or its other settings have no use for.

    Raises:
      ValueError: naming the setting and what to give instead.
    """
    if config.reference is not None and "reference" not in loss.needs:
        raise ValueError(f"The loss {loss.name!r} uses no reference; leave it out.")
    make_movement(config.moving, loss)
    if not named_reference(config.reference).is_precomputed:
        if config.reference_cache is not None:
            raise ValueError(
                "--reference-cache has no effect on a reference that is computed in "
                "every step; give --reference precomputed, or precomputed:MODEL."
            )
        return
    instead = "give --reference a model, or leave it out for the policy at step 0."
    if config.moving.kind != "none":
        raise ValueError(
            "The log-probabilities of a reference that moves cannot be precomputed; "
            f"leave out --moving, or {instead}"
        )
    if "token_kl" in loss.needs:
        raise ValueError(
            f"The loss {loss.name!r} compares whole distributions, of which nothing is "
            f"precomputed; {instead}"
        )
    if "mismatched" in loss.needs:
        raise ValueError(
            f"The loss {loss.name!r} gives every example a completion that changes "
            f"with the batch, so nothing can be precomputed; {instead}"
        )
