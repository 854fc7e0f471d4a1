"""Jitted sampling with a key-value cache. Knows no tokenizer and no file.

Prompts of different lengths are padded on the left, so that all rows of a batch write
the same place of the cache at each step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dpojax.log_probs import logits_of

Params = Any
# (params, prompts, is_prompt, key) -> tokens [rows, new], the end filled with EOS
Generate = Callable[[Params, ArrayLike, ArrayLike, Array], Array]


class _Progress(NamedTuple):
    step: Int[Array, ""]
    tokens: Int[Array, "rows new"]
    ended: Bool[Array, " rows"]
    logits: Float[Array, "rows vocabulary"]
    cache: Any


def pad_left(
    prompts: Sequence[Sequence[int]], length: int, num_rows: int
) -> tuple[Int[np.ndarray, "rows length"], Bool[np.ndarray, "rows length"]]:
    """Prompts as an array, and which of its entries are theirs.

    Rows beyond the prompts repeat the last one: they fill a batch whose number of rows
    is fixed.

    Raises:
      ValueError: if a prompt is longer than `length`.
    """
    longest = max(map(len, prompts))
    if longest > length:
        raise ValueError(f"A prompt has {longest} tokens; the rows have {length}.")
    tokens = np.zeros((num_rows, length), np.int32)
    is_prompt = np.zeros((num_rows, length), bool)
    for row in range(num_rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        tokens[row, length - len(prompt) :] = prompt
        is_prompt[row, length - len(prompt) :] = True
    return tokens, is_prompt


def make_generate(
    extend: Callable[..., tuple[Array, Any, Any]],
    empty_cache: Callable[[int, int], Any],
    *,
    eos_token: int,
    num_new: int,
    temperature: float = 1.0,
) -> Generate:
    """Builds ``generate(params, prompts, is_prompt, key) -> tokens``, jitted.

    Args:
      extend: the model: parameters, new tokens, their positions, the example number of
        every key, cache and offset, to hidden states, output matrix and new cache.
      empty_cache: rows and keys to a cache.
      eos_token: ends a row; what follows it is EOS too.
      num_new: most tokens to generate.
      temperature: divides the logits; 0 takes the most likely token.

    Returns:
      A function of parameters, prompts padded on the left ``[rows, length]``, their
      mask likewise, and a random key; it stops once every row has ended.

    Raises:
      ValueError: if the temperature is negative or `num_new` not positive.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must not be negative.")
    if num_new < 1:
        raise ValueError(f"At least one token must be generated, not {num_new}.")

    def choose(logits: Array, key: Array) -> Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        return jax.random.categorical(key, logits / temperature)

    def generate(params: Params, prompts: Array, is_prompt: Array, key: Array) -> Array:
        num_rows, length = prompts.shape
        padding = jnp.sum(~is_prompt, axis=1, keepdims=True)
        new = jnp.ones((num_rows, num_new), bool)
        example = jnp.concatenate([is_prompt, new], axis=1).astype(jnp.int32)

        def advance(tokens: Array, cache: Any, offset: Array | int) -> tuple:
            index = offset + jnp.arange(tokens.shape[1])
            position = jnp.maximum(index - padding, 0)
            hidden, output, cache = extend(
                params, tokens, position, example, cache, offset
            )
            logits = logits_of(hidden[:, -1], output)
            return logits, cache

        def unfinished(progress: _Progress) -> Array:
            return (progress.step < num_new) & ~jnp.all(progress.ended)

        def step(progress: _Progress) -> _Progress:
            chosen = choose(progress.logits, jax.random.fold_in(key, progress.step))
            chosen = jnp.where(progress.ended, eos_token, chosen).astype(jnp.int32)
            tokens = progress.tokens.at[:, progress.step].set(chosen)
            ended = progress.ended | (chosen == eos_token)
            offset = length + progress.step
            logits, cache = advance(chosen[:, None], progress.cache, offset)
            return _Progress(progress.step + 1, tokens, ended, logits, cache)

        logits, cache = advance(prompts, empty_cache(num_rows, length + num_new), 0)
        tokens = jnp.full((num_rows, num_new), eos_token, jnp.int32)
        ended = jnp.zeros(num_rows, bool)
        start = _Progress(jnp.zeros((), jnp.int32), tokens, ended, logits, cache)
        return jax.lax.while_loop(unfinished, step, start).tokens

    return jax.jit(generate)


def trim(tokens: Sequence[int] | Int[np.ndarray, " new"], eos_token: int) -> list[int]:
    """A generated row up to its EOS, that included."""
    row = [int(token) for token in tokens]
    return row[: row.index(eos_token) + 1] if eos_token in row else row
