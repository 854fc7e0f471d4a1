"""Sampling with a cache against full forward passes, transformers and probabilities."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from dpojax import log_probs
from dpojax.batch import Batch
from dpojax.generate import WATCH_EVERY, Generate, make_generate, pad_left, trim
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
NEVER = -1  # an end-of-sequence token that no logit stands for


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(CONFIG, remat="none")


@pytest.fixture(scope="module")
def params(model: Model) -> Params:
    return jax.jit(model.init)(jax.random.key(0))


def make(model: Model, eos_token: int, temperature: float = 0.0) -> Generate:
    return make_generate(
        model.extend,
        model.empty_cache,
        eos_token=eos_token,
        num_new=NUM_NEW,
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
    model = make_model(as_decoder_config(read_settings(tmp_path)), remat="none")
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


def sample_two(
    model: Model, params: Params, temperature: float, num_samples: int = 1
) -> Callable[[int], np.ndarray]:
    """A function of the seed to two tokens of each of 32,000 samples of a prompt."""
    generate = make_generate(
        model.extend,
        model.empty_cache,
        eos_token=NEVER,
        num_new=2,
        temperature=temperature,
        num_samples=num_samples,
    )
    prompts = pad_left([PROMPTS[2]], 3, 32_000 // num_samples)
    return lambda seed: np.asarray(generate(params, *prompts, jax.random.key(seed)))


def test_the_same_seed_gives_the_same_samples_and_another_others(
    model: Model, params: Params
):
    sample = sample_two(model, params, 0.7)
    first, again, other = (sample(seed) for seed in (2, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=0).all()


@pytest.mark.parametrize(
    ("temperature", "num_samples"),
    [(0.7, 1), (1.0, 1), (1.0, 32_000)],
    ids=["temperature 0.7", "temperature 1", "samples that share a prefill"],
)
def test_tokens_are_drawn_with_their_softmax_probabilities(
    model: Model, params: Params, logits_of, temperature: float, num_samples: int
):
    """Pearson's statistic of 24 tokens exceeds 59.2 once in twenty thousand times."""

    def statistic(tokens: np.ndarray, prompt: list[int]) -> float:
        logits = logits_of(prompt).astype(np.float64) / temperature
        probability = np.exp(logits - logits.max())
        expected = len(tokens) * probability / probability.sum()
        assert expected.max() < 0.9 * len(tokens)
        counts = np.bincount(tokens, minlength=24)
        return float(((counts - expected) ** 2 / expected).sum())

    first, second = sample_two(model, params, temperature, num_samples)(2).T
    assert statistic(first, PROMPTS[2]) < 59.2
    most = int(np.bincount(first).argmax())
    assert statistic(second[first == most], [*PROMPTS[2], most]) < 59.2


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


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_samples_are_the_same_on_four_devices(
    model: Model, params: Params, sizes: tuple[int, int, int]
):
    """Rows over the devices and, in the last two, the parameters as well."""
    mesh = make_mesh(*sizes)
    placement = make_placement(mesh)
    generate = make_generate(
        model.extend,
        model.empty_cache,
        eos_token=NEVER,
        num_new=NUM_NEW,
        temperature=0.9,
        num_samples=4,
    )
    prompts = pad_left(PROMPTS, 6, 4)
    sharded = jax.device_put(params, as_shardings(params, mesh))
    found = generate(sharded, *placement.put(prompts), jax.random.key(4))
    assert len(found.sharding.device_set) == 4 and found.shape == (16, NUM_NEW)
    alone = generate(params, *prompts, jax.random.key(4))
    np.testing.assert_array_equal(found, alone)


class Steps:
    """A model's function that counts how often it runs."""

    def __init__(self, extend: Callable[..., Any]):
        self.count = 0
        self.extend = extend

    def __call__(self, *args: Any) -> Any:
        jax.debug.callback(self._increase)
        return self.extend(*args)

    def _increase(self) -> None:
        self.count += 1


def test_rows_that_a_watch_ends_save_steps_and_leave_the_others_as_they_are(
    model: Model, params: Params
):
    """Seen at 8, 16, ... tokens; the first row ends at 8, the last at 16."""
    steps = Steps(model.extend)
    generate = make_generate(steps, model.empty_cache, eos_token=NEVER, num_new=44)
    prompts = *pad_left(PROMPTS, 6, 3), jax.random.key(0)
    whole = np.asarray(generate(params, *prompts))
    jax.effects_barrier()
    assert steps.count == 1 + 44
    seen: list[int] = []

    def watch(tokens: np.ndarray) -> np.ndarray:
        seen.append(tokens.shape[1])
        return seen[-1] >= np.array([8, 16, 16])

    steps.count = 0
    found = np.asarray(generate(params, *prompts, watch))
    jax.effects_barrier()
    assert WATCH_EVERY == 8 and seen == [8, 16]
    assert steps.count == 1 + 16
    np.testing.assert_array_equal(found[0, :8], whole[0, :8])
    np.testing.assert_array_equal(found[1:, :16], whole[1:, :16])
    assert (found[0, 8:] == NEVER).all() and (found[:, 16:] == NEVER).all()


def test_a_watch_that_ends_nothing_changes_nothing(model: Model, params: Params):
    generate = make_generate(
        model.extend, model.empty_cache, eos_token=3, num_new=20, num_samples=4
    )
    prompts = *pad_left(PROMPTS, 6, 3), jax.random.key(0)
    seen: list[np.ndarray] = []

    def watch(tokens: np.ndarray) -> np.ndarray:
        seen.append(tokens)
        return np.zeros(len(tokens), bool)

    whole = np.asarray(generate(params, *prompts))
    np.testing.assert_array_equal(generate(params, *prompts, watch), whole)
    assert [tokens.shape for tokens in seen] == [(12, 8), (12, 16), (12, 20)]
    for tokens in seen:
        np.testing.assert_array_equal(tokens, whole[:, : tokens.shape[1]])


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
