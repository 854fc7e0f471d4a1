"""Statistics of the softmax over a vocabulary, at the scored positions only.

Logits exist for one chunk of positions and one tile of the vocabulary at a time, so
neither tokens nor vocabulary decide how much memory they take. The forward pass keeps
the gradient by the hidden state, since what a log-probability's gradient is multiplied
by later is one number a position. The gradient by the matrix is computed in a loop of
its own, from logits computed again: nothing but the optimiser waits for it, so the
compiler puts it after the layers' backward pass, and it takes no memory beside theirs.
Where the matrix is frozen, that loop is not there.

Whatever the model computes in, softmax and sums are float32. This file knows no loss,
no completions and no model.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from dpojax.sharding import TOKENS
from dpojax.spread import MatrixShard, Spread
from dpojax.vocabulary.backward import backward
from dpojax.vocabulary.forward import Kept, TokenStatistics, forward
from dpojax.vocabulary.tiles import How, Operand


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_statistics(
    how: How,
    this: Operand,
    other: Operand | None,
    labels: Int[Array, "rows length"],
    scored: Bool[Array, "rows length"],
) -> TokenStatistics:
    """Statistics of each scored position.

    The gradient is by `this` alone, of its log-probabilities and of ``kl``; everything
    else is a constant.

    Args:
      how: what is wanted beside log-probabilities, positions of a chunk, and the mesh.
      this: hidden states and output matrix.
      other: those of another model, for ``kl`` and ``other_log_prob``.
      labels: the token that each position predicts.
      scored: positions that count.
    """
    return _forward(how, this, other, labels, scored, keeps_slope=False)[0]


def _forward_rule(
    how: How, this: Any, other: Any, labels: Any, scored: Any
) -> tuple[TokenStatistics, tuple]:
    frozen = not (this.matrix.perturbed or (this.bias and this.bias.perturbed))
    values = jax.tree.map(lambda leaf: leaf.value, (this, other, labels, scored))
    # KL's gradient is not one vector times a number: all of it waits for the slopes.
    found, kept = _forward(how, *values, keeps_slope="kl" not in how.wanted)
    if frozen and kept.slope is not None:
        kept = kept._replace(normaliser=None)
    return found, (*values, kept)


def _backward_rule(how: How, residuals: tuple, slopes: TokenStatistics) -> tuple:
    this, other, labels, scored, kept = residuals
    log_prob, kl = (
        None if slope is None or isinstance(slope, SymbolicZero) else slope
        for slope in (slopes.log_prob, slopes.kl)
    )
    if log_prob is None and kl is None or kept.normaliser is None:
        by_this = jax.tree.map(jnp.zeros_like, this)
    else:
        by_this = _backward(how, this, other, labels, scored, kept, log_prob, kl)
    if kept.slope is not None and log_prob is not None:
        by_hidden = kept.slope * jnp.where(scored, log_prob, 0.0)[..., None]
        by_this = by_this._replace(hidden=by_hidden.astype(this.hidden.dtype))
    return by_this, jax.tree.map(jnp.zeros_like, other), None, None


token_statistics.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _specs(spread: Spread, operand: Operand | None) -> Any:
    if operand is None:
        return None
    matrix = spread.matrix_spec(operand.matrix)
    bias = None if operand.bias is None else PartitionSpec(matrix[0])
    cap = None if operand.cap is None else PartitionSpec()
    specs: Any = (TOKENS, matrix, bias, cap)
    return Operand(*specs)


def _shards(
    spread: Spread, this: Operand, other: Operand | None
) -> tuple[MatrixShard, ...]:
    operands = (this,) if other is None else (this, other)
    return tuple(spread.shard(operand.matrix) for operand in operands)


def _forward(
    how: How,
    this: Operand,
    other: Operand | None,
    labels: Array,
    scored: Array,
    *,
    keeps_slope: bool,
) -> tuple[TokenStatistics, Kept]:
    spread = how.spread
    local = partial(forward, how, _shards(spread, this, other), keeps_slope)
    in_specs = (_specs(spread, this), _specs(spread, other), TOKENS, TOKENS)
    return spread.map(local, in_specs, TOKENS)(this, other, labels, scored)


def _backward(
    how: How,
    this: Operand,
    other: Operand | None,
    labels: Array,
    scored: Array,
    kept: Kept,
    log_prob: Array | None,
    kl: Array | None,
) -> Operand:
    spread = how.spread
    specs = _specs(spread, this), _specs(spread, other)
    local = partial(backward, how, _shards(spread, this, other))
    in_specs = (*specs, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS)
    mapped = spread.map(local, in_specs, specs[0])
    return mapped(this, other, labels, scored, kept, log_prob, kl)
