"""What a step has to compute, whatever way it is computed: tokens and model FLOPs.

A product of a ``[m, k]`` and a ``[k, n]`` matrix takes ``2 m k n`` operations. What is
counted is what the result needs: a prompt once for all its completions, keys that a
query sees, logits of scored positions. Padding, masked scores and what is computed
twice to save memory count nothing, nor do norms, softmax and the optimiser, so the
share of the hardware's peak that these FLOPs reach tells of all waste.
"""

from typing import NamedTuple

import numpy as np

from dpojax.batch import Batch
from dpojax.models.shape import DecoderConfig, layer_windows


class Forward(NamedTuple):
    """FLOPs of one forward pass, by what the backward pass makes of them."""

    projections: float  # products of layers' matrices with positions
    attention: float  # products of queries, keys and values with each other
    head: float  # logits


def num_positions(batch: Batch) -> int:
    """Positions that hold a token; a prompt's are there once."""
    return int(np.count_nonzero(batch.example))


def num_sequence_tokens(batch: Batch) -> int:
    """Tokens of all sequences, each of a prompt and one completion.

    A prompt counts as often as it has completions, as where each sequence has a row of
    its own: a speed in these tokens compares with that of other trainers.
    """
    total = 0
    for example, branch in zip(
        np.asarray(batch.example), np.asarray(batch.branch), strict=True
    ):
        for number in range(1, example.max(initial=0) + 1):
            counts = np.bincount(branch[example == number])
            # The prompt's last token stands at the beginning of each branch instead.
            prompt, completions = counts[0] + 1, counts[1:]
            total += int(np.sum(prompt + completions[completions > 0]))
    return total


def visible_pairs(batch: Batch, window: int | None) -> int:
    """Pairs of a query and a key that it sees.

    A token at position t of its own sequence sees t others and itself, or the last
    `window` of these.
    """
    seen = np.asarray(batch.position)[np.asarray(batch.example) > 0] + 1
    return int(np.sum(seen if window is None else np.minimum(seen, window)))


def matrix_size(config: DecoderConfig) -> int:
    """Numbers in one layer's matrices that each token meets."""
    width = config.width
    queries = config.num_heads * config.head_dimension
    keys = config.num_key_heads * config.head_dimension
    attention = width * (2 * queries + 2 * keys)
    experts = config.experts
    if experts is not None:
        inside = 3 * width * experts.width * experts.per_token
        return attention + inside + width * experts.number
    return attention + (3 if config.mlp == "gated" else 2) * width * config.mlp_width


def forward_flops(config: DecoderConfig, batch: Batch, first: int = 0) -> Forward:
    """FLOPs of hidden states and the logits of scored positions.

    ``projections = 2 layers matrix_size positions``;
    ``attention = sum over layers of 4 heads dimension pairs`` (scores, and the sum of
    values); ``head = 2 vocabulary width scored``, with a reward model's one row per
    completion in place of the vocabulary's.

    Args:
      config: the model's shape.
      batch: its rows, on the host.
      first: only layers from this one on are counted.
    """
    per_pair = 4 * config.num_heads * config.head_dimension
    windows = layer_windows(config)[first:]
    pairs = {window: visible_pairs(batch, window) for window in set(windows)}
    outputs = config.vocabulary_size * np.count_nonzero(batch.scored)
    if config.head == "score":
        outputs = np.count_nonzero(batch.completion_length)
    return Forward(
        projections=2.0 * len(windows) * matrix_size(config) * num_positions(batch),
        attention=float(per_pair * sum(pairs[window] for window in windows)),
        head=2.0 * config.width * outputs,
    )


def step_flops(
    config: DecoderConfig,
    batch: Batch,
    *,
    has_reference: bool,
    adapter_size: int | None = None,
    trunk: int = 0,
) -> float:
    """FLOPs of a train step: forward, backward, and the reference's forward pass.

    With ``F = projections + attention + head`` a step takes ``3 F``: the backward pass
    has two products for each of the forward pass, one for either factor's gradient.
    Where only adapters are trained, matrices get no gradient: ``2 projections + 3
    attention + 2 head``, and ``3 * 2 adapter_size positions``. A reference adds ``F``.
    Layers below all adapters take one forward pass, which is the reference's too.

    Args:
      config: the model's shape.
      batch: its rows, on the host.
      has_reference: whether the reference's log-probabilities are computed in the step.
      adapter_size: numbers in all adapters, if they alone are trained; None: all is.
      trunk: layers below all adapters.
    """
    forward = forward_flops(config, batch, trunk)
    below = sum(forward_flops(config, batch)) - sum(forward)
    if adapter_size is None:
        trained = 3 * sum(forward)
    else:
        adapters = 2.0 * adapter_size * num_positions(batch)
        frozen = forward.projections + forward.head
        trained = 2 * frozen + 3 * (forward.attention + adapters)
    return below + trained + (sum(forward) if has_reference else 0)
