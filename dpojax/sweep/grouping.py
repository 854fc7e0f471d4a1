"""Which runs of a sweep one compiled program can train.

They may differ in the objective and its settings, in the learning rate, and in the
seed; what else differs makes another program, or other data. This file reads settings.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dpojax.config import LossConfig, TrainConfig
from dpojax.losses.make import Loss
from dpojax.losses.objective import Need
from dpojax.prepare import make_configured_loss
from dpojax.sweep.grid import Point

# What one loss asks for and all runs of its program would pay for, or be fed.
_APART: frozenset[Need] = frozenset({"score", "mismatched", "token_kl", "reward_head"})


class Trial(NamedTuple):
    """One run of a sweep."""

    number: int  # by which its directory is named
    changes: dict[str, str]  # how it differs from the others
    config: TrainConfig
    loss: Loss

    @property
    def directory(self) -> Path:
        """Where it writes."""
        assert self.config.output is not None  # `as_trials` names one
        return Path(self.config.output)


def as_trials(points: Sequence[Point], output: str) -> list[Trial]:
    """The runs of a grid, each with a directory in `output`.

    Raises:
      ValueError: for a loss or a setting of it that there is not.
    """
    trials = []
    for number, (changes, config) in enumerate(points):
        loss = make_configured_loss(config.loss)
        config = replace(config, output=f"{output}/{number}")
        if "reference" not in loss.needs:  # it is there for others
            config = replace(config, reference=None, reference_cache=None)
        trials.append(Trial(number, changes, config, loss))
    return trials


def in_programs(trials: Sequence[Trial], points: Sequence[Point]) -> list[list[Trial]]:
    """The trials by the program that trains them, in the order of the first of each."""
    programs: dict[Hashable, list[Trial]] = {}
    for trial, point in zip(trials, points, strict=True):
        programs.setdefault(_key(trial, point.config), []).append(trial)
    return list(programs.values())


def representative(trials: Sequence[Trial]) -> Trial:
    """One whose model and reference do for all of a program."""
    with_reference = (trial for trial in trials if "reference" in trial.loss.needs)
    return next(with_reference, trials[0])


def _key(trial: Trial, config: TrainConfig) -> Hashable:
    """What must be equal; `config` is as it was given."""
    loss, optimizer = trial.loss, replace(config.optimizer, learning_rate=None)
    rest = replace(config, loss=LossConfig(), optimizer=optimizer, seed=0)
    # The masks of dropout and a reward model's first head are drawn by it.
    is_drawn = config.lora.dropout > 0 or "reward_head" in loss.needs
    seed = config.seed if is_drawn else None
    return repr(rest), loss.kind, loss.needs & _APART, seed
