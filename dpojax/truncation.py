"""Which tokens may come next, and which one does: temperature, top-k, top-p, min-p.

Each rule masks logits as the processor of the same name in `transformers` does, and in
its order: temperature first, then top-k, top-p and min-p, each on what is left. Knows
logits only: no model, no cache, no sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Logits = Float[Array, "rows vocabulary"]
Choose = Callable[[Array, Array], Array]  # (logits, key) -> tokens [rows]


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Unlikely tokens that are never drawn; a rule left at None does nothing.

    Raises:
      ValueError: for a number with which a rule cannot work or has no effect.
    """

    top_k: int | None = None
    """Keep this many of the most likely tokens."""
    top_p: float | None = None
    """Keep the fewest most likely tokens whose probabilities add up to this."""
    min_p: float | None = None
    """Keep tokens that have at least this share of the highest probability."""

    def __post_init__(self):
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1.")
        for name in ("top_p", "min_p"):
            value = vars(self)[name]
            if value is not None and not 0 < value < 1:
                raise ValueError(
                    f"{name} is {value:g}; it must lie between 0 and 1, both excluded; "
                    "leave it out to keep every token."
                )


EVERY_TOKEN = Truncation()


def make_choose(temperature: float, truncation: Truncation) -> Choose:
    """Builds ``choose(logits, key) -> tokens``.

    Args:
      temperature: divides the logits; 0 takes the most likely token.
      truncation: what is never drawn, at the given temperature.

    Raises:
      ValueError: if the temperature is no number from 0 on, or is 0 with a truncation.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature is {temperature:g}; it must not be negative, but a number."
        )
    given = [name for name, value in vars(truncation).items() if value is not None]
    if temperature == 0 and given:
        raise ValueError(
            f"{given[0]} has no effect at temperature 0, which takes the most likely "
            "token; leave one of the two out."
        )

    def choose(logits: Logits, key: Array) -> Int[Array, " rows"]:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        kept = truncate(logits / temperature, truncation)
        return jax.random.categorical(key, kept)

    return choose


def truncate(logits: Logits, truncation: Truncation) -> Logits:
    """Logits with minus infinity where the rules forbid a token.

    Raises:
      ValueError: if top_k is not below the size of the vocabulary.
    """
    if truncation.top_k is not None:
        logits = _keep_top_k(logits, truncation.top_k)
    if truncation.top_p is not None:
        logits = _keep_top_p(logits, truncation.top_p)
    if truncation.min_p is not None:
        logits = _keep_min_p(logits, truncation.min_p)
    return logits


def _keep_top_k(logits: Logits, top_k: int) -> Logits:
    """The k largest, and what equals the smallest of them."""
    size = logits.shape[-1]
    if top_k >= size:
        raise ValueError(
            f"top_k is {top_k}, but the vocabulary has {size} tokens; give fewer, or "
            "leave it out to keep every token."
        )
    smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
    return _where(logits >= smallest, logits)


def _keep_top_p(logits: Logits, top_p: float) -> Logits:
    """The nucleus of Holtzman et al. 2020, arXiv:1904.09751, section 3.1.

    Of equally likely tokens at its border those with the higher numbers are in it.
    """
    order = jnp.argsort(logits, axis=-1, stable=True)  # least likely first
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    kept = (mass > 1 - top_p).at[:, -1].set(True)
    rank = jnp.argsort(order, axis=-1)
    return _where(jnp.take_along_axis(kept, rank, axis=-1), logits)


def _keep_min_p(logits: Logits, min_p: float) -> Logits:
    """Nguyen et al. 2024, arXiv:2407.01082, equation 2."""
    probability = jax.nn.softmax(logits, axis=-1)
    highest = jnp.max(probability, axis=-1, keepdims=True)
    return _where(probability >= min_p * highest, logits)


def _where(kept: Array, logits: Logits) -> Logits:
    return jnp.where(kept, logits, -jnp.inf)
