"""What a loss is given and what it returns: numbers, one per example.

Nothing here knows a model, a token or a batch layout.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Scores(NamedTuple):
    """One completion of each example."""

    policy: Float[Array, "*batch"]  # sum of log p(token) over the completion, nats
    reference: Float[Array, "*batch"] | None  # the same under the reference
    length: Int[Array, "*batch"]  # number of scored tokens, EOS included

    @property
    def log_ratio(self) -> Float[Array, "*batch"]:
        """``log pi(y|x) - log pi_ref(y|x)``: the implicit reward over beta."""
        if self.reference is None:
            raise ValueError(
                "This loss needs the reference's log-probabilities and was given none; "
                "give a reference or choose a reference-free loss."
            )
        return self.policy - self.reference


class Outcome(NamedTuple):
    """A loss for each example, and its implicit rewards where it defines them."""

    loss: Float[Array, "*batch"]
    chosen_reward: Float[Array, "*batch"] | None = None
    rejected_reward: Float[Array, "*batch"] | None = None
