"""Jitted sampling with a key-value cache. Knows no tokenizer and no file.

Prompts of different lengths are padded on the left, so that all rows of a batch write
the same place of the cache at each step. Several samples of a prompt share its prefill:
the prompt is computed once, and its rows of the cache are repeated. Steps run in one
compiled loop; where someone watches, it pauses every few steps, its state kept on the
devices, and goes on with the rows that have not come to their end.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dpojax.log_probs import logits_of
from dpojax.processes import gathered
from dpojax.truncation import EVERY_TOKEN, Choose, Truncation, make_choose

Params = Any
# (params, tokens, position, example, cache, offset) -> hidden states, output, cache
Extend = Callable[..., tuple[Array, Any, Any]]
# Tokens so far [rows x samples, steps] to the rows that need no more of them.
Watch = Callable[[Int[np.ndarray, "rows steps"]], Bool[np.ndarray, " rows"]]
WATCH_EVERY = 8  # steps
# (params, prompts, is_prompt, key, watch=None) -> tokens [rows x samples, new], samples
# of a prompt side by side, EOS after a row's end
Generate = Callable[..., Array]


class _Progress(NamedTuple):
    step: Int[Array, ""]
    tokens: Int[Array, "rows new"]
    ended: Bool[Array, " rows"]
    logits: Float[Array, "rows vocabulary"]
    example: Int[Array, "rows keys"]
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
    extend: Extend,
    empty_cache: Callable[[int, int], Any],
    *,
    eos_token: int,
    num_new: int,
    temperature: float = 1.0,
    truncation: Truncation = EVERY_TOKEN,
    num_samples: int = 1,
) -> Generate:
    """Builds ``generate(params, prompts, is_prompt, key) -> tokens``, jitted.

    Args:
      extend: the model: parameters, new tokens, their positions, the example number of
        every key, cache and offset, to hidden states, output matrix and new cache.
      empty_cache: rows and keys to a cache, of arrays ``[layers, rows, ...]``.
      eos_token: ends a row; what follows it is EOS too.
      num_new: most tokens to generate.
      temperature: divides the logits; 0 takes the most likely token.
      truncation: tokens that are too unlikely to be drawn.
      num_samples: of each prompt.

    Returns:
      A function of parameters, prompts padded on the left ``[rows, length]``, their
      mask likewise, and a random key; it stops once every row has ended. If it is given
      a watch too, that is asked every `WATCH_EVERY` steps which rows are to end; the
      others stay as they are.

    Raises:
      ValueError: for a temperature or truncation that cannot be; if `num_new` or
        `num_samples` is not positive; for several samples at temperature 0.
    """
    choose = make_choose(temperature, truncation)
    check_counts(num_new, num_samples, temperature)
    prefill = _make_prefill(extend, empty_cache, eos_token, num_new, num_samples)
    decode = _make_decode(extend, choose, eos_token, num_new)

    def generate(
        params: Params,
        prompts: ArrayLike,
        is_prompt: ArrayLike,
        key: Array,
        watch: Watch | None = None,
    ) -> Array:
        progress = prefill(params, prompts, is_prompt)
        stopped = np.zeros(progress.ended.shape, bool)
        if watch is None:
            return decode(params, progress, key, num_new, stopped).tokens
        for start in range(0, num_new, WATCH_EVERY):
            until = min(start + WATCH_EVERY, num_new)
            progress = decode(params, progress, key, until, stopped)
            tokens, ended = map(gathered, (progress.tokens, progress.ended))
            stopped = watch(tokens[:, :until])
            if np.all(ended | stopped):
                break
        return progress.tokens

    return generate


def _make_prefill(
    extend: Extend,
    empty_cache: Callable[[int, int], Any],
    eos_token: int,
    num_new: int,
    num_samples: int,
) -> Callable[..., _Progress]:
    """Builds ``prefill(params, prompts, is_prompt) -> progress`` at step 0."""

    def prefill(params: Params, prompts: Array, is_prompt: Array) -> _Progress:
        num_prompts, length = prompts.shape
        new = jnp.ones((num_prompts, num_new), bool)
        example = jnp.concatenate([is_prompt, new], axis=1).astype(jnp.int32)
        cache = empty_cache(num_prompts, length + num_new)
        logits, cache = _advance(extend, params, prompts, example, cache, 0)
        logits, example = (_repeat(part, num_samples, 0) for part in (logits, example))
        cache = jax.tree.map(lambda part: _repeat(part, num_samples, 1), cache)
        num_rows = num_prompts * num_samples
        tokens = jnp.full((num_rows, num_new), eos_token, jnp.int32)
        ended, step = jnp.zeros(num_rows, bool), jnp.zeros((), jnp.int32)
        return _Progress(step, tokens, ended, logits, example, cache)

    return jax.jit(prefill)


def _make_decode(
    extend: Extend, choose: Choose, eos_token: int, num_new: int
) -> Callable[..., _Progress]:
    """Builds ``decode(params, progress, key, until, stopped) -> progress``.

    It goes on until that step, without the rows that have stopped, and takes over the
    progress that it is given.
    """

    def decode(
        params: Params,
        progress: _Progress,
        key: Array,
        until: Int[Array, ""],
        stopped: Bool[Array, " rows"],
    ) -> _Progress:
        example = progress.example
        length = example.shape[1] - num_new

        def unfinished(now: _Progress) -> Array:
            return (now.step < until) & ~jnp.all(now.ended)

        def take_step(now: _Progress) -> _Progress:
            chosen = choose(now.logits, jax.random.fold_in(key, now.step))
            chosen = jnp.where(now.ended, eos_token, chosen).astype(jnp.int32)
            tokens = now.tokens.at[:, now.step].set(chosen)
            ended = now.ended | (chosen == eos_token)
            new, offset = chosen[:, None], length + now.step
            logits, cache = _advance(extend, params, new, example, now.cache, offset)
            return _Progress(now.step + 1, tokens, ended, logits, example, cache)

        start = progress._replace(ended=progress.ended | stopped)
        return jax.lax.while_loop(unfinished, take_step, start)

    return jax.jit(decode, donate_argnums=1)


def _advance(
    extend: Extend,
    params: Params,
    tokens: Array,
    example: Array,
    cache: Any,
    offset: Array | int,
) -> tuple[Array, Any]:
    """The logits after new tokens, and the cache with these."""
    index = offset + jnp.arange(tokens.shape[1])
    padding = jnp.sum(example == 0, axis=1, keepdims=True)
    position = jnp.maximum(index - padding, 0)
    hidden, output, cache = extend(params, tokens, position, example, cache, offset)
    return logits_of(hidden[:, -1], output), cache


def check_counts(num_new: int, num_samples: int, temperature: float) -> None:
    """Refuses numbers of tokens and samples that cannot be, or are all the same.

    Raises:
      ValueError: naming the number.
    """
    if num_new < 1:
        raise ValueError(f"At least one token must be generated, not {num_new}.")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be positive.")
    if num_samples > 1 and temperature == 0:
        raise ValueError(
            f"At temperature 0 all {num_samples} samples of a prompt are the same; ask "
            "for one, or give a temperature."
        )


def _repeat(array: Array, count: int, axis: int) -> Array:
    """Each entry of an axis `count` times, side by side.

    By broadcasting: where the axis is sharded, every device repeats what it has.
    """
    if count == 1:
        return array
    shape = array.shape
    wide = jnp.expand_dims(array, axis + 1)
    wide = jnp.broadcast_to(wide, (*shape[: axis + 1], count, *shape[axis + 1 :]))
    return wide.reshape(*shape[:axis], shape[axis] * count, *shape[axis + 1 :])


def trim(tokens: Sequence[int] | Int[np.ndarray, " new"], eos_token: int) -> list[int]:
    """A generated row up to its EOS, that included."""
    row = [int(token) for token in tokens]
    return row[: row.index(eos_token) + 1] if eos_token in row else row
