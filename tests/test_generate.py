"""Sampling with a cache against full forward passes, transformers and probabilities."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from dpojax import log_probs
from dpojax.batch import Batch
from dpojax.generate import Generate, make_generate, pad_left, trim
from dpojax.models.decoder import DecoderConfig, Model, make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.functional import Params
from dpojax.models.huggingface import read_params, read_settings
from dpojax.sharding import as_shardings, make_mesh, make_placement
from dpojax.truncation import Truncation

CONFIG = DecoderConfig(
    vocabulary_size=24,
    width=32,
    num_layers=2,
    num_heads=4,
    num_key_heads=2,
    head_dimension=8,
    mlp_width=48,
    initializer_range=0.3,
)
PROMPTS = [[5, 9, 3, 17, 4, 11], [8], [12, 7, 20]]
NUM_NEW = 8
LogitsOf = Callable[[list[int]], np.ndarray]
NEVER = -1  # an end-of-sequence token that no logit stands for


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(CONFIG, remat=False)


@pytest.fixture(scope="module")
def params(model: Model) -> Params:
    return jax.jit(model.init)(jax.random.key(0))


def make(
    model: Model, eos_token: int, temperature: float = 0.0, num_new: int = NUM_NEW
) -> Generate:
    return make_generate(
        model.extend,
        model.empty_cache,
        eos_token=eos_token,
        num_new=num_new,
        temperature=temperature,
    )


def run(generate: Generate, params: Params, seed: int = 0) -> list[list[int]]:
    prompts = pad_left(PROMPTS, 6, 3)
    return generate(params, *prompts, jax.random.key(seed)).tolist()


@pytest.fixture(scope="module")
def greedy(model: Model, params: Params) -> list[list[int]]:
    return run(make(model, NEVER), params)


@pytest.fixture(scope="module")
def logits_of(model: Model, params: Params):
    """Logits after a sequence, by a full forward pass."""

    @jax.jit
    def compute(tokens: jax.Array, last: jax.Array) -> jax.Array:
        position = jnp.arange(16)[None]
        example = (position <= last).astype(jnp.int32)
        zeros = jnp.zeros_like(tokens)
        lengths = jnp.zeros((1, 1, 1), jnp.int32)
        supervision = jnp.zeros((1, 1, 1)), jnp.ones((1, 1))
        batch = Batch(tokens, zeros, position, example, zeros, lengths, *supervision)
        hidden, output = model.apply(params, batch)
        return log_probs.logits_of(hidden[0, last], output)

    def logits(sequence: list[int]) -> np.ndarray:
        tokens = jnp.array([sequence + [0] * (16 - len(sequence))], jnp.int32)
        return np.asarray(compute(tokens, len(sequence) - 1))

    return logits


def test_greedy_decoding_equals_repeated_full_forward_passes(
    greedy: list[list[int]], logits_of
):
    for prompt, found in zip(PROMPTS, greedy, strict=True):
        sequence = list(prompt)
        for _ in range(NUM_NEW):
            sequence.append(int(logits_of(sequence).argmax()))
        assert found == sequence[len(prompt) :]
    assert len({token for row in greedy for token in row}) > 4


def test_greedy_decoding_equals_that_of_transformers(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs: Any = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens, is_prompt = pad_left(PROMPTS, 6, 3)
    expected = theirs.generate(
        torch.tensor(tokens).long(),
        attention_mask=torch.tensor(is_prompt).long(),
        do_sample=False,
        max_new_tokens=NUM_NEW,
    )
    model = make_model(as_decoder_config(read_settings(tmp_path)), remat=False)
    whole = SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: whole, model.params)
    params = read_params(tmp_path, model.params, shardings)
    assert run(make(model, NEVER), params) == expected[:, 6:].tolist()


def test_eos_ends_a_row_and_fills_the_rest(
    model: Model, params: Params, greedy: list[list[int]]
):
    eos = greedy[1][2]
    found = run(make(model, eos), params)
    for row, unended in zip(found, greedy, strict=True):
        kept = trim(unended, eos)
        assert row == kept + [eos] * (NUM_NEW - len(kept))
        assert trim(row, eos) == kept
    assert len(trim(found[1], eos)) <= 3


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_that_is_watched_draws_the_same_tokens_until_it_is_done(
    model: Model, params: Params, temperature: float
):
    """Rows are done after 8, 16 and no tokens; one that is done is filled with EOS."""
    generate = make(model, NEVER, temperature, num_new=20)
    prompts = pad_left(PROMPTS, 6, 3)
    whole = np.asarray(generate(params, *prompts, jax.random.key(1)))
    seen = []

    def watch(tokens: np.ndarray) -> np.ndarray:
        seen.append(tokens)
        return np.array([True, tokens.shape[1] >= 16, False])

    found = np.asarray(generate(params, *prompts, jax.random.key(1), watch))
    assert [tokens.shape for tokens in seen] == [(3, 8), (3, 16), (3, 20)]
    np.testing.assert_array_equal(seen[0], whole[:, :8])
    for row, length in enumerate((8, 16, 20)):
        np.testing.assert_array_equal(found[row, :length], whole[row, :length])
        assert set(found[row, length:].tolist()) <= {NEVER}


def test_no_step_is_taken_once_every_row_is_done(model: Model, params: Params):
    """Of 64 tokens 8 are drawn: 3 rows are done then, and a model call is a step."""
    calls = []

    def counted(params: Params, tokens: jax.Array, *rest: Any) -> Any:
        jax.debug.callback(lambda: calls.append(tokens.shape))
        return model.extend(params, tokens, *rest)

    generate = make_generate(
        counted, model.empty_cache, eos_token=NEVER, num_new=64, temperature=0.0
    )
    prompts = (*pad_left(PROMPTS, 6, 3), jax.random.key(0))
    generate(params, *prompts, lambda tokens: np.ones(3, bool)).block_until_ready()
    jax.effects_barrier()
    assert calls == [(3, 6)] + 8 * [(3, 1)]
    calls.clear()
    generate(params, *prompts).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 1 + 64


def test_trim_keeps_the_eos_and_a_row_without_one():
    assert trim([4, 5, 2, 2], 2) == [4, 5, 2]
    assert trim(np.array([4, 5]), 2) == [4, 5]
    assert trim([2], 2) == [2]


def test_pad_left_repeats_the_last_prompt_in_rows_to_fill():
    tokens, is_prompt = pad_left([[7, 8], [9]], 3, 3)
    assert tokens.tolist() == [[0, 7, 8], [0, 0, 9], [0, 0, 9]]
    assert is_prompt.tolist() == [[False, True, True]] + [[False, False, True]] * 2


def test_a_prompt_longer_than_the_padding_is_refused():
    with pytest.raises(ValueError, match="has 3 tokens; the rows have 2"):
        pad_left([[7], [7, 8, 9]], 2, 2)


class Sampled(NamedTuple):
    """Two tokens of 8000 equal rows at a temperature, with seeds 2, 2 and 3."""

    temperature: float
    tokens: list[np.ndarray]


@pytest.fixture(scope="module", params=[0.7, 1.0])
def sampled(request: pytest.FixtureRequest, model: Model, params: Params) -> Sampled:
    generate = make(model, NEVER, request.param, num_new=2)
    prompts = pad_left([PROMPTS[2]], 3, 8000)
    tokens = [
        np.asarray(generate(params, *prompts, jax.random.key(seed)))
        for seed in (2, 2, 3)
    ]
    return Sampled(request.param, tokens)


def test_the_same_seed_gives_the_same_samples_and_another_others(
    sampled: Sampled,
):
    first, again, other = sampled.tokens
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=0).all()


def check_frequencies(
    tokens: np.ndarray, logits_of: LogitsOf, prompt: list[int], temperature: float
) -> None:
    """First and second tokens against their softmax, by Pearson's statistic.

    It has mean 23 and variance 46 where every token is expected a few times: below
    23 + 4 * 6.8 = 50. A temperature that is off by a tenth exceeds it.
    """

    def statistic(tokens: np.ndarray, prompt: list[int], temperature: float) -> float:
        logits = logits_of(prompt).astype(np.float64) / temperature
        probability = np.exp(logits - logits.max())
        expected = len(tokens) * probability / probability.sum()
        assert expected.max() < 0.9 * len(tokens)
        counts = np.bincount(tokens, minlength=24)
        return float(((counts - expected) ** 2 / expected).sum())

    first, second = tokens.T
    assert statistic(first, prompt, temperature) < 50
    assert statistic(first, prompt, 1.1 * temperature) > 50
    most = int(np.bincount(first).argmax())
    assert statistic(second[first == most], [*prompt, most], temperature) < 50


def test_tokens_are_drawn_with_their_softmax_probabilities(
    sampled: Sampled, logits_of: LogitsOf
):
    check_frequencies(sampled.tokens[0], logits_of, PROMPTS[2], sampled.temperature)


def test_samples_that_share_a_prefill_are_drawn_with_the_same_probabilities(
    model: Model, params: Params, logits_of: LogitsOf
):
    generate = make_generate(
        model.extend, model.empty_cache, eos_token=NEVER, num_new=2, num_samples=8000
    )
    prompts = [PROMPTS[0], PROMPTS[2]]
    tokens = np.asarray(generate(params, *pad_left(prompts, 6, 2), jax.random.key(3)))
    for prompt, of_prompt in zip(prompts, tokens.reshape(2, 8000, 2), strict=True):
        check_frequencies(of_prompt, logits_of, prompt, 1.0)


@pytest.fixture(scope="module")
def several(model: Model, params: Params) -> np.ndarray:
    """Four samples of each of three prompts."""
    generate = make_generate(
        model.extend,
        model.empty_cache,
        eos_token=NEVER,
        num_new=NUM_NEW,
        temperature=0.9,
        num_samples=4,
    )
    return np.asarray(generate(params, *pad_left(PROMPTS, 6, 3), jax.random.key(4)))


def test_samples_that_share_a_prefill_are_those_of_repeated_prompts(
    model: Model, params: Params, several: np.ndarray
):
    repeated = [prompt for prompt in PROMPTS for _ in range(4)]
    generate = make(model, NEVER, temperature=0.9)
    prompts = pad_left(repeated, 6, 12)
    apart = generate(params, *prompts, jax.random.key(4))
    np.testing.assert_array_equal(several, apart)
    assert len({tuple(row) for row in several.tolist()}) == 12


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 1)])
def test_samples_are_the_same_on_four_devices(
    model: Model, params: Params, shape: tuple[int, int, int]
):
    """Copies of the model, or two copies that share its parameters; watched or not."""
    mesh = make_mesh(*shape)
    placement = make_placement(mesh)
    generate = make_generate(
        model.extend,
        model.empty_cache,
        eos_token=NEVER,
        num_new=20,
        temperature=0.9,
        num_samples=4,
    )
    prompts, key = pad_left(PROMPTS, 6, 4), jax.random.key(4)
    one = np.asarray(generate(params, *prompts, key))
    placed = jax.device_put(params, as_shardings(params, mesh))
    assert len({leaf.sharding.spec for leaf in jax.tree.leaves(placed)}) > 1
    four = generate(placed, *placement.put(prompts), key)
    assert placement.num_shards == 4 and one.shape == (16, 20)
    np.testing.assert_array_equal(np.asarray(four), one)

    def never(tokens: np.ndarray) -> np.ndarray:
        return np.zeros(len(tokens), bool)

    watched = generate(placed, *placement.put(prompts), key, never)
    np.testing.assert_array_equal(np.asarray(watched), one)


def test_a_truncated_sample_takes_only_tokens_that_are_left(
    model: Model, params: Params, logits_of
):
    generate = make_generate(
        model.extend,
        model.empty_cache,
        eos_token=NEVER,
        num_new=2,
        truncation=Truncation(top_k=3),
        num_samples=100,
    )
    prompts = pad_left([PROMPTS[2]], 3, 1)
    first, second = np.asarray(generate(params, *prompts, jax.random.key(0))).T
    best = np.argsort(logits_of(PROMPTS[2]))[-3:]
    assert set(first.tolist()) == set(best.tolist())
    most = int(np.bincount(first).argmax())
    best = np.argsort(logits_of([*PROMPTS[2], most]))[-3:]
    assert set(second[first == most].tolist()) <= set(best.tolist())


def test_no_samples_and_several_equal_ones_are_refused(model: Model):
    functions = model.extend, model.empty_cache
    with pytest.raises(ValueError, match="num_samples is 0; it must be positive"):
        make_generate(*functions, eos_token=2, num_new=1, num_samples=0)
    with pytest.raises(ValueError, match="all 2 samples of a prompt are the same"):
        make_generate(
            *functions, eos_token=2, num_new=1, num_samples=2, temperature=0.0
        )


def test_a_negative_temperature_and_no_new_tokens_are_refused(model: Model):
    functions = model.extend, model.empty_cache
    with pytest.raises(
        ValueError, match="temperature is -0.5; it must not be negative"
    ):
        make_generate(*functions, eos_token=2, num_new=1, temperature=-0.5)
    with pytest.raises(ValueError, match="At least one token must be generated, not 0"):
        make_generate(*functions, eos_token=2, num_new=0)
