"""The row layout: a prompt, K completions that branch from it, several examples a row.

    tokens    p0 p1 p2 | p3 c1 c2 c3 | p3 r1 r2 | q0 | q1 c1 ... | 0 0
    labels     .  .  . | c1 c2 c3 $  | r1 r2 $  |  . | c1 c2 ... | . .
    position   0  1  2 |  3  4  5  6 |  3  4  5 |  0 |  1  2 ... | 0 0
    example    1  1  1 |  1  1  1  1 |  1  1  1 |  2 |  2  2 ... | 0 0
    branch     0  0  0 |  1  1  1  1 |  2  2  2 |  0 |  1  1 ... | 0 0

Every branch begins with a copy of the prompt's last token, so that each of its tokens
predicts the next one of its own branch: ``branch > 0`` is the set of scored positions,
but for labels of -1, another speaker's turn inside a completion. Token j is
visible to token i when ``j <= i``, both belong to one example, and ``branch[j]`` is 0
or ``branch[i]``.

This file knows neither how text becomes tokens nor what a model does with them.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """Rows of tokens, on the host as NumPy arrays or on devices as JAX arrays.

    ``slots`` is the most examples that a row holds and ``completions`` the most
    completions of an example; what a row does not use has length 0.
    """

    tokens: Int[Array, "rows length"]
    labels: Int[Array, "rows length"]  # the token to predict; -1 unscored, 0 outside
    position: Int[Array, "rows length"]  # of the token in its own sequence
    example: Int[Array, "rows length"]  # 1, 2, ... within the row; 0 is padding
    branch: Int[Array, "rows length"]  # 0 is the prompt; k is the k-th completion
    completion_length: Int[Array, "rows slots completions"]  # scored tokens, with EOS
    # What the annotator said of each completion: a rating, or 1 for good and 0 for bad.
    score: Float[Array, "rows slots completions"]
    weight: Float[Array, "rows slots"]  # how much an example counts; 0: no example
    # Log-probabilities under the reference, nats, where they are known beforehand: of
    # whole completions, and of as many first tokens as all of their example have.
    reference: Float[Array, "rows slots completions"] | None = None
    reference_prefix: Float[Array, "rows slots completions"] | None = None

    @property
    def scored(self) -> Bool[Array, "rows length"]:
        """Positions whose label counts."""
        return (self.branch > 0) & (self.labels >= 0)

    @property
    def live(self) -> Bool[Array, "rows slots"]:
        """Slots that hold an example."""
        return self.completion_length[..., 0] > 0
