"""FLOPs and tokens of a batch: by hand, and against the compiler's count."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.batch import Batch
from dpojax.data.packing import Example, as_batch
from dpojax.flops import (
    forward_flops,
    matrix_size,
    num_positions,
    num_sequence_tokens,
    step_flops,
    visible_pairs,
)
from dpojax.log_probs import logits_of
from dpojax.models.decoder import DecoderConfig, make_model
from dpojax.models.shape import ExpertShape

SHAPE = DecoderConfig(
    vocabulary_size=10,
    width=4,
    num_layers=3,
    num_heads=2,
    num_key_heads=1,
    head_dimension=2,
    mlp_width=5,
)


def pair(prompt: int, chosen: int, rejected: int) -> Example:
    ones = [np.ones(length, np.int32) for length in (prompt, chosen, rejected)]
    return Example(ones[0], (ones[1], ones[2]))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Prompt 3 with completions of 2 and 4; then 1 with 1 and 1, and padding."""
    return as_batch([[pair(3, 2, 4), pair(1, 1, 1)], []], length=12, num_slots=2)


def test_by_hand_what_a_batch_holds(batch: Batch):
    """Positions 2 + 2 + 4 and 0 + 1 + 1; sequences 5 + 7 and 2 + 2.

    Of the first example the prompt's tokens see 1 and 2, the branches 3, 4 and 3, 4, 5,
    6: 28 pairs; of the second one each. With a window of 3: 1 + 2 + 2 * 3 + 4 * 3.
    """
    assert num_positions(batch) == 8 + 2
    assert num_sequence_tokens(batch) == 12 + 4
    assert visible_pairs(batch, None) == 28 + 2
    assert visible_pairs(batch, 3) == 21 + 2


def test_by_hand_flops_of_a_forward_pass(batch: Batch):
    """Matrices 4 * (4 + 2 + 2 + 4) and 3 * 4 * 5: 108 numbers, 3 layers, 10 positions.

    30 pairs of 2 heads of 2: 4 * 4 * 30 a layer. 8 scored positions, 10 logits of 4.
    """
    assert matrix_size(SHAPE) == 108
    assert forward_flops(SHAPE, batch) == (2 * 3 * 108 * 10, 3 * 480, 2 * 10 * 4 * 8)


def test_by_hand_flops_of_a_step(batch: Batch):
    """6480 + 1440 + 640 = 8560 forward; adapters of 7 numbers take 140 more."""
    assert step_flops(SHAPE, batch, has_reference=False) == 3 * 8560
    assert step_flops(SHAPE, batch, has_reference=True) == 4 * 8560
    adapted = step_flops(SHAPE, batch, has_reference=True, adapter_size=7)
    assert adapted == 2 * (6480 + 640) + 3 * (1440 + 140) + 8560


def test_by_hand_layers_below_all_adapters_take_one_forward_pass(batch: Batch):
    """Of three layers of 2160 + 480, two lie below; the third's pass is repeated."""
    how = {"adapter_size": 7, "trunk": 2}
    trained = 2 * (2160 + 640) + 3 * (480 + 140)
    alone = step_flops(SHAPE, batch, has_reference=False, **how)
    assert alone == 2 * 2640 + trained
    beside = step_flops(SHAPE, batch, has_reference=True, **how)
    assert beside == alone + 2640 + 640
    windowed = replace(SHAPE, window=3, window_layers=(True, False, False))
    assert forward_flops(windowed, batch, first=1).attention == 4 * 4 * (30 + 30)


def test_by_hand_variants(batch: Batch):
    """A window in one layer; two MLP matrices; two of five experts and their router."""
    windowed = replace(SHAPE, window=3, window_layers=(True, False, False))
    assert forward_flops(windowed, batch).attention == 4 * 4 * (23 + 30 + 30)
    assert matrix_size(replace(SHAPE, mlp="plain")) == 48 + 2 * 20
    experts = ExpertShape(number=5, per_token=2, width=3, renormalised=True)
    assert matrix_size(replace(SHAPE, experts=experts)) == 48 + 2 * 3 * 4 * 3 + 4 * 5
    assert forward_flops(replace(SHAPE, head="score"), batch).head == 2 * 4 * 4


@pytest.mark.parametrize("backward", [False, True])
def test_the_compiler_counts_the_same(backward: bool):
    """Of one layer, whose scan has one turn; of all pairs, which a dense mask computes.

    The compiler counts norms, softmax and rotations too: a few per cent.
    """
    config = DecoderConfig(
        vocabulary_size=256,
        width=128,
        num_layers=1,
        num_heads=4,
        num_key_heads=2,
        head_dimension=32,
        mlp_width=512,
    )
    batch = as_batch([[pair(32, 16, 17)]] * 4, length=64)
    model = make_model(config, remat="none")

    def total(params: dict) -> jax.Array:
        hidden, head = model.apply(params, batch)
        return jnp.sum(logits_of(hidden, head))

    function = jax.grad(total) if backward else total
    analysis = jax.jit(function).lower(model.params).compile().cost_analysis()
    counted = forward_flops(config, batch)
    dense = counted.attention * 4 * 64**2 / visible_pairs(batch, None)
    head = counted.head * batch.tokens.size / np.count_nonzero(batch.scored)
    expected = counted.projections + dense + head
    assert analysis is not None
    assert analysis["flops"] == pytest.approx(
        (3 if backward else 1) * expected, rel=0.03
    )
