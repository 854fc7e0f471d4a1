"""From hidden states and a reward model's head to rewards, one per completion.

    reward(prompt, completion) = w . h

h is the final hidden state at the completion's last input: its end of sequence, where
`dpojax.data.packing.end_as_input` has made that an input. Like log-probabilities,
rewards are read within their row, so that sharded rows need no communication, and in
float32 whatever the model computes in. This file knows no loss and no model.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpojax.batch import Batch
from dpojax.log_probs import Head, as_head, sum_completions


def completion_rewards(
    hidden: Float[Array, "rows length width"],
    head: Float[Array, "1 width"] | Head,
    batch: Batch,
) -> Float[Array, "rows slots completions"]:
    """Reward of each completion: ``w . h`` at the last position of its branch.

    Args:
      hidden: final hidden states ``[rows, length, width]``.
      head: the weights of the scalar head ``[1, width]``, alone or in a `Head`.
      batch: the rows that the hidden states belong to.

    Returns:
      ``[rows, slots, completions]`` float32; 0 where a slot or completion is empty.

    References:
      Stiennon et al., Learning to Summarize from Human Feedback, 2020,
      arXiv:2009.01325, section 3.4.
    """
    # Masked before the product: padding may hold anything, and its gradient is 0 too.
    read = jnp.where(branch_ends(batch)[..., None], hidden.astype(jnp.float32), 0.0)
    per_position = jnp.einsum(
        "rlw,w->rl",
        read,
        as_head(head).matrix[0].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return sum_completions(per_position, batch)


def branch_ends(batch: Batch) -> Bool[Array, "rows length"]:
    """The last position of every branch: there the next one is of another."""
    example, branch = jnp.asarray(batch.example), jnp.asarray(batch.branch)
    return (branch > 0) & (_changes(example) | _changes(branch))


def _changes(array: Array) -> Array:
    following = jnp.pad(array[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return array != following
