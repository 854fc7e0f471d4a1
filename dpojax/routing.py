"""Where routers send tokens, and the loss that asks them to spread these evenly.

A model with experts gives these counts beside its output; training and evaluation add
them up. This file knows no model and no batch.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Choice(NamedTuple):
    """What one layer's router makes of every token."""

    probability: Float[Array, "rows length experts"]  # of every expert
    index: Int[Array, "rows length chosen"]  # of the experts that a token is sent to


class Routing(NamedTuple):
    """Choices of all layers, summed over the tokens of each row or of all rows."""

    assigned: Float[Array, "*rows experts"]  # how often an expert was chosen
    probability: Float[Array, "*rows experts"]
    count: Float[Array, "*rows"]  # tokens, one for each layer that saw it


def count_choices(choice: Choice, real: Bool[Array, "rows length"]) -> Routing:
    """The sums of one layer over the real tokens of each row."""
    experts = jnp.arange(choice.probability.shape[-1])
    chosen = (choice.index[..., None] == experts) & real[..., None, None]
    return Routing(
        jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32),
        jnp.sum(jnp.where(real[..., None], choice.probability, 0.0), axis=1),
        jnp.sum(real, axis=1, dtype=jnp.float32),
    )


def over_rows(routing: Routing) -> Routing:
    """The sums of all rows."""
    return Routing(*(jnp.sum(array, axis=0) for array in routing))


def load_balancing_loss(routing: Routing) -> Float[Array, ""]:
    """``E sum_e f_e P_e`` of E experts: k, the experts of a token, if all are alike.

    f_e is how often a token was sent to expert e, P_e its mean probability; both are
    means over the tokens of all layers together, as transformers takes them. Only P
    has a gradient.

    Args:
      routing: the sums of all rows.

    References:
      Fedus et al., Switch Transformers, 2021, arXiv:2101.03961, equations 4 to 6.
    """
    count = routing.count + (routing.count == 0)  # of no token, the loss is 0
    frequency, probability = routing.assigned / count, routing.probability / count
    return routing.assigned.shape[-1] * jnp.sum(frequency * probability)
