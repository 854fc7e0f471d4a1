"""Gradients of single examples, by ``vmap`` over rows that hold one example each.

For whatever looks at examples one by one: the influence of a pair, the noise of a
gradient, the clipping of differential privacy. This file knows no optimiser.
"""

import jax
import jax.numpy as jnp

from dpojax.batch import Batch
from dpojax.gradient import denominators, judge
from dpojax.losses.make import Loss
from dpojax.measure import Apply, Params, make_measure


def per_example_gradients(
    apply: Apply, loss: Loss, params: Params, reference: Params | None, batch: Batch
) -> Params:
    """The gradient of each example's own loss.

    Their mean, weighted by ``batch.weight``, is the gradient of the train step; but for
    losses with a part per token (`Outcome.token_loss`), which the step averages over
    the tokens of the whole batch. All of them are in memory at one time, rows times the
    size of the parameters: give a large set in pieces.

    Args:
      apply: the model: parameters and batch to hidden states and output matrix.
      loss: the objective.
      params: what the gradient is by: the policy, or whatever `apply` takes.
      reference: parameters of the reference; None where the batch brings its
        log-probabilities along, or the loss needs none.
      batch: one example a row.

    Returns:
      The tree of `params`, each array with a first axis of rows; 0 for an empty row.

    Raises:
      ValueError: for a loss that looks at other examples too, or rows that hold more
        than one.
    """
    if loss.batchwise or loss.initial_running():
        raise ValueError(
            f"The loss {loss.name!r} of an example depends on other examples, so it "
            "has no gradient of its own; choose a loss without statistics of a batch."
        )
    if batch.weight.shape[1] != 1:
        raise ValueError(
            f"Rows of up to {batch.weight.shape[1]} examples have no gradient of each; "
            "lay the batch out with one example a row."
        )
    measure = make_measure(apply, loss.needs)

    def own_loss(params: Params, row: Batch) -> jax.Array:
        alone = jax.tree.map(lambda array: array[None], row)
        measured = measure(params, reference, alone)
        return judge(loss, measured, alone, {}, denominators(alone))[0]

    rows = jax.tree.map(jnp.asarray, batch)
    return jax.vmap(jax.grad(own_loss), in_axes=(None, 0))(params, rows)
