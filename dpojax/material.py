"""What a run is made of: its model, its examples and its reference.

This file reads settings; it knows no step and no loop.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from dpojax.config import TrainConfig
from dpojax.course import mismatch_within
from dpojax.data.bad_records import Skipped
from dpojax.data.packing import Example, with_mismatched
from dpojax.examples import balance_advice, load_split
from dpojax.loading import Loaded, as_reward_examples, check_positions
from dpojax.losses.make import Loss
from dpojax.policy import Policy, load_policy, make_policy
from dpojax.precompute import precompute
from dpojax.progress import say
from dpojax.reference_setting import named_reference


class Material(NamedTuple):
    """Everything that is loaded before the first step."""

    loaded: Loaded
    policy: Policy
    train: Sequence[Example]
    test: Sequence[Example]
    skipped: Sequence[Skipped]  # bad records that were left out
    reference_identity: str | None  # of a precomputed reference


def load_material(config: TrainConfig, loss: Loss, mesh: Mesh) -> Material:
    """Loads what settings name.

    Raises:
      ValueError: for models and data that cannot be read or do not fit each other.
    """
    loaded = load_policy(config, loss, mesh)
    check_positions(loaded, config.max_length)
    skipped: list[Skipped] = []
    train = load_split(config, loss, loaded.tokenizer, config.train_split, skipped)
    test = load_split(config, loss, loaded.tokenizer, config.test_split, skipped)
    if "reward_head" in loss.needs:
        train, test = (as_reward_examples(part, loaded) for part in (train, test))
    advice = balance_advice(loss, train)
    if advice is not None:
        say(advice)
    within = mismatch_within(config, loss)
    if within is not None:
        test = with_mismatched(test, within)
    policy = make_policy(config, loss, loaded, mesh)
    identity = None
    if named_reference(config.reference).is_precomputed:
        (train, test), cache = precompute(config, loaded, mesh, (train, test))
        identity = cache.identity
    return Material(loaded, policy, train, test, skipped, identity)
