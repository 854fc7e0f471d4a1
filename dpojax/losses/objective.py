"""What is said of an objective beside its function: a row of the table.

Nothing here knows a model or a batch layout.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from dpojax.losses.scores import Outcome

# What an example is: a completion to imitate or forget; a chosen and a rejected one;
# one with a label; K with scores.
Kind = Literal["single", "pair", "judged", "ranked"]
# What a loss asks for beside the policy's log-probabilities and the lengths.
Need = Literal[
    "reference",
    "score",  # scores of pairs; judged and ranked examples have them by nature
    "prefix",
    "log_sum_squares",
    "token_kl",
    "mismatched",  # another prompt's completion, as a second branch
    "reward_head",  # rewards of a scalar head instead of log-probabilities
]


class Running(NamedTuple):
    """Statistics that a loss carries from step to step; they are checkpointed."""

    initial: Callable[[], Any]
    update: Callable[..., Any]  # (running, *scores, **some settings) -> running


class Objective(NamedTuple):
    """A loss and what a run must provide for it."""

    function: Callable[..., Outcome]  # of one `Scores` per completion, or of all K
    formula: str
    source: str
    kind: Kind = "pair"
    needs: tuple[Need, ...] = ("reference",)
    learning_rate: float = 1e-6  # default for full fine-tuning, with AdamW
    averages: bool = False  # over the tokens of a completion
    cancels: bool = False  # only differences of rewards count: any f-divergence may
    batchwise: bool = False  # one example's loss depends on the others of its batch
    running: Running | None = None


class Mixture(NamedTuple):
    """A weighted sum of objectives that has a name."""

    terms: str
    settings: Mapping[str, Any]
    source: str
