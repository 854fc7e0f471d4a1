"""The objectives that are compared, and the run of each. Knows no result."""

from pathlib import Path
from typing import NamedTuple

from sizes import Size

from dpojax.config import LossConfig, OptimizerConfig, TrainConfig

OBJECTIVES = {
    "dpo, beta 0.05": LossConfig(name="dpo", beta=0.05),
    "unlikelihood, alpha 0.1": LossConfig(name="unlikelihood", alpha=0.1),
    "preferred-FT": LossConfig(name="sft"),
    "dpo, beta 0.1": LossConfig(name="dpo", beta=0.1),
    "dpo, beta 1": LossConfig(name="dpo", beta=1.0),
    "dpo, beta 5": LossConfig(name="dpo", beta=5.0),
    "unlikelihood, alpha 0.5": LossConfig(name="unlikelihood", alpha=0.5),
    "ipo, beta 0.1": LossConfig(name="ipo", beta=0.1),
    "kto, beta 0.1": LossConfig(name="kto", beta=0.1),
    "hinge, beta 0.1": LossConfig(name="hinge", beta=0.1),
    "simpo": LossConfig(name="simpo"),
}
"""The most telling first: a table of a run that is cut off compares something.

DPO's betas are the paper's. Betas of the others are their own defaults or the papers'.
"""


class Policy(NamedTuple):
    """What the compared policies differ in."""

    name: str  # the objective's
    rate: float  # the largest learning rate
    seed: int


def alignment(
    policy: Policy, model: Path, pairs: Path, output: Path, size: Size
) -> TrainConfig:
    """The run that makes a policy: constant rate after the warm-up, as in the paper.

    All have the same data and steps; a seed decides the order of the data.
    """
    every = size.steps // size.points
    return TrainConfig(
        loss=OBJECTIVES[policy.name],
        model=str(model),
        data=(str(pairs),),
        output=str(output),
        seed=policy.seed,
        test_size=64 if size.num_reviews is None else 4,
        max_length=size.length,
        batch_size=size.pairs_per_step,
        steps=size.steps,
        sample_prompts=0,
        log_every=every,
        evaluate_every=size.steps,
        save_every=every,
        keep_last=size.points,
        optimizer=OptimizerConfig(
            learning_rate=policy.rate, schedule="constant", beta2=0.99
        ),
    )
