"""Temperature, top-k, top-p and min-p: by hand, and against transformers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.truncation import Truncation, make_choose, truncate

# Probabilities whose order is not that of the tokens.
PROBABILITIES = [0.1, 0.4, 0.05, 0.25, 0.2]


def kept(probabilities: list[float], truncation: Truncation) -> list[int]:
    """The tokens that are left of one row."""
    logits = jnp.log(jnp.array([probabilities]))
    left = np.asarray(truncate(logits, truncation))
    is_left = np.isfinite(left)
    np.testing.assert_array_equal(left[is_left], np.asarray(logits)[is_left])
    return np.flatnonzero(is_left[0]).tolist()


def test_by_hand_top_k_keeps_the_most_likely_tokens():
    assert kept(PROBABILITIES, Truncation(top_k=1)) == [1]
    assert kept(PROBABILITIES, Truncation(top_k=3)) == [1, 3, 4]


def test_by_hand_top_p_keeps_the_fewest_tokens_that_reach_it():
    """From the most likely on the sums are 0.4, 0.65, 0.85, 0.95, 1."""
    assert kept(PROBABILITIES, Truncation(top_p=0.3)) == [1]
    assert kept(PROBABILITIES, Truncation(top_p=0.5)) == [1, 3]
    assert kept(PROBABILITIES, Truncation(top_p=0.9)) == [0, 1, 3, 4]


def test_by_hand_min_p_keeps_a_share_of_the_highest_probability():
    """The share 0.45 of 0.4 is 0.18, 0.3 is 0.12, 0.2 is 0.08."""
    assert kept(PROBABILITIES, Truncation(min_p=0.45)) == [1, 3, 4]
    assert kept(PROBABILITIES, Truncation(min_p=0.2)) == [0, 1, 3, 4]


def test_by_hand_each_rule_sees_what_the_one_before_it_left():
    """Of 0.4 and 0.25 alone the first has 0.62, so that 0.6 needs no more."""
    assert kept(PROBABILITIES, Truncation(top_p=0.6)) == [1, 3]
    assert kept(PROBABILITIES, Truncation(top_k=2, top_p=0.6)) == [1]


def test_without_rules_nothing_changes():
    assert kept(PROBABILITIES, Truncation()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(top_k=1),
        Truncation(top_k=10),
        Truncation(top_p=0.1),
        Truncation(top_p=0.9),
        Truncation(min_p=0.05),
        Truncation(min_p=0.5),
        Truncation(top_k=20, top_p=0.8, min_p=0.1),
    ],
)
def test_the_masks_are_those_of_transformers(
    temperature: float, truncation: Truncation
):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    logits = np.random.default_rng(0).normal(0, 2, (64, 97)).astype(np.float32)
    logits[32:] = np.round(logits[32:])  # many tokens are equally likely
    classes = {
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    ids = torch.zeros((64, 1), dtype=torch.long)
    warm = logits_process.TemperatureLogitsWarper(temperature)
    expected = warm(ids, torch.tensor(logits))
    for name, value in vars(truncation).items():
        if value is not None:
            expected = classes[name](value)(ids, expected)
    found = truncate(jnp.asarray(logits) / temperature, truncation)
    np.testing.assert_allclose(found[:32], expected[:32].numpy(), rtol=1e-6)
    tied = np.asarray(found[32:]), expected[32:].numpy()
    if truncation.top_p is not None:
        # Which of equally likely tokens top-p keeps, torch leaves to its sort.
        tied = np.sort(tied[0]), np.sort(tied[1])
    np.testing.assert_allclose(*tied, rtol=1e-6)
    assert np.isinf(found).any()


@pytest.mark.parametrize("temperature", [0.6, 1.4])
@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(top_k=30, top_p=0.8),
        Truncation(top_p=0.7, min_p=0.3),
        Truncation(top_k=20, top_p=0.9, min_p=0.15),
    ],
)
def test_the_rules_follow_each_other_as_in_transformers_own_sampling(
    temperature: float, truncation: Truncation
):
    """A Llama's raw logits, and the scores that its `generate` draws from."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.7,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs: Any = LlamaForCausalLM(config).eval()
    drawn = theirs.generate(
        torch.arange(1, 65)[:, None],
        attention_mask=torch.ones((64, 1), dtype=torch.long),
        do_sample=True,
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        temperature=temperature,
        # Where nothing is given, transformers would keep its 50 most likely.
        **{"top_k": 0} | {k: v for k, v in vars(truncation).items() if v is not None},
    )
    logits = jnp.asarray(drawn.logits[0].numpy())
    found = truncate(logits / temperature, truncation)
    np.testing.assert_allclose(found, drawn.scores[0].numpy(), rtol=1e-5)
    num_left = np.isfinite(found).sum(axis=1)
    assert num_left.min() < num_left.max() < 97


def test_tokens_are_drawn_as_often_as_the_truncated_softmax_says():
    """Left at temperature 2 are the roots of 0.4, 0.25, 0.2: shares .400, .316, .283.

    Pearson's statistic of three has mean 2 and exceeds 18.4 once in ten thousand.
    """
    choose = make_choose(2.0, Truncation(top_k=3))
    logits = jnp.broadcast_to(jnp.log(jnp.array(PROBABILITIES)), (9000, 5))
    tokens = np.asarray(choose(logits, jax.random.key(0)))
    counts = np.bincount(tokens, minlength=5)
    assert counts[[0, 2]].sum() == 0
    roots = np.sqrt([0.4, 0.25, 0.2])
    expected = 9000 * roots / roots.sum()
    assert ((counts[[1, 3, 4]] - expected) ** 2 / expected).sum() < 18.4


def test_temperature_0_takes_the_most_likely_token():
    logits = jnp.log(jnp.array([PROBABILITIES, PROBABILITIES[::-1]]))
    choose = make_choose(0.0, Truncation())
    assert choose(logits, jax.random.key(0)).tolist() == [1, 3]


@pytest.mark.parametrize("value", [-0.1, 0.0, 1.0, float("nan")])
def test_a_share_outside_of_0_and_1_is_refused(value: float):
    with pytest.raises(ValueError, match="top_p is .*; it must lie between 0 and 1"):
        Truncation(top_p=value)
    with pytest.raises(ValueError, match="min_p is .*; it must lie between 0 and 1"):
        Truncation(min_p=value)


def test_a_top_k_that_keeps_nothing_or_everything_is_refused():
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        Truncation(top_k=0)
    with pytest.raises(ValueError, match="top_k is 5, but the vocabulary has 5"):
        truncate(jnp.zeros((1, 5)), Truncation(top_k=5))


@pytest.mark.parametrize("temperature", [-0.5, float("inf"), float("nan")])
def test_a_temperature_that_is_no_number_from_0_on_is_refused(temperature: float):
    with pytest.raises(ValueError, match=f"temperature is {temperature:g}; it must"):
        make_choose(temperature, Truncation())


@pytest.mark.parametrize(
    "truncation",
    [Truncation(top_k=3), Truncation(top_p=0.5), Truncation(min_p=0.5)],
)
def test_a_truncation_at_temperature_0_is_refused(truncation: Truncation):
    with pytest.raises(ValueError, match="has no effect at temperature 0"):
        make_choose(0.0, truncation)
