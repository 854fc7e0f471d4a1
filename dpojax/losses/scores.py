"""What a loss is given and what it returns: numbers, one per completion or example.

Nothing here knows a model, a token or a batch layout.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Scores(NamedTuple):
    """One completion of each example; for rankings with a last axis of completions.

    A completion that is not there, in an empty slot or a shorter list, has length 0;
    whatever a loss says of it counts nowhere.
    """

    policy: Float[Array, "*batch"]  # sum of log p(token) over the completion, nats
    reference: Float[Array, "*batch"] | None  # the same under the reference
    length: Int[Array, "*batch"]  # number of scored tokens, EOS included
    # What only some losses ask for:
    # the annotator's rating, or 1 for desirable and 0 for undesirable;
    score: Float[Array, "*batch"] | None = None
    # sums over the first tokens only, as many as every completion of the example has;
    policy_prefix: Float[Array, "*batch"] | None = None
    reference_prefix: Float[Array, "*batch"] | None = None
    # sum over tokens of log sum_v p(v)^2;
    log_sum_squares: Float[Array, "*batch"] | None = None
    # sum over tokens of KL(reference || policy), over the whole vocabulary, nats.
    token_kl: Float[Array, "*batch"] | None = None

    @property
    def present(self) -> Bool[Array, "*batch"]:
        """Where there is a completion."""
        return self.length > 0

    @property
    def log_ratio(self) -> Float[Array, "*batch"]:
        """``log pi(y|x) - log pi_ref(y|x)``: the implicit reward over beta."""
        return self.policy - given(self.reference, "the reference's log-probabilities")

    @property
    def average(self) -> Float[Array, "*batch"]:
        """Log-probability per token."""
        return self.policy / self.divisor

    @property
    def average_log_ratio(self) -> Float[Array, "*batch"]:
        """Log-ratio per token."""
        return self.log_ratio / self.divisor

    @property
    def divisor(self) -> Int[Array, "*batch"]:
        """The length, but 1 where there is no completion."""
        return jnp.maximum(self.length, 1)

    @property
    def rating(self) -> Float[Array, "*batch"]:
        """The annotator's score."""
        return given(self.score, "the annotators' scores or labels")


class Outcome(NamedTuple):
    """A loss of each example, and what it says of its completions."""

    loss: Float[Array, "*batch"]  # averaged over examples by the caller
    # Implicit rewards, one array for each `Scores` that is judged, in their order.
    rewards: tuple[Float[Array, "*scores"], ...] = ()
    # A second part, summed over the tokens of the first completion; the caller divides
    # it by the number of those tokens in the whole batch, so that each weighs the same.
    token_loss: Float[Array, "*batch"] | None = None
    # Numbers of the whole batch worth logging, by name.
    logged: Mapping[str, Float[Array, ""]] | None = None


def given(array: Array | None, what: str) -> Array:
    """What a loss cannot do without.

    Raises:
      ValueError: if it was not given.
    """
    if array is None:
        raise ValueError(
            f"This loss needs {what} and was given none; provide them or choose a loss "
            "that does without."
        )
    return array
