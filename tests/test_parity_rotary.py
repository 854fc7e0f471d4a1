"""Every kind of rotary scaling against transformers, on both sides of its context.

Two kinds depend on a sequence's length. transformers takes the longest of a batch, here
it is the longest of an example; so its sequences are run one at a time.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import SIZES, Pair, greedy, make_pair

from dpojax.batch import Batch
from dpojax.data.packing import Example, as_batch
from dpojax.log_probs import logits_of

ORIGINAL = 12  # positions before scaling
LENGTHS = [5, ORIGINAL, ORIGINAL + 1, 30]
NUM_NEW = 6

SHORT = {"max_position_embeddings": ORIGINAL}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
EXTENDED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = EXTENDED | {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = EXTENDED | {"rope_type": "yarn"}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 7.0],
}
PHI3 = {"original_max_position_embeddings": ORIGINAL, "hidden_size": 48}


def scaled(rope: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return changes | {"rope_parameters": {"rope_theta": 10000.0} | rope}


def of_full_attention(rope: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings of a family that scales some of its layers."""
    parameters = {
        "full_attention": {"rope_theta": 10000.0} | rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return {"sliding_window": 5, "rope_parameters": parameters} | changes


GEMMA3 = {
    "config": "Gemma3TextConfig",
    "head_dim": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-none": ("Llama", {}),
    "llama-linear": ("Llama", scaled(LINEAR)),
    "llama-dynamic": ("Llama", scaled(DYNAMIC, **SHORT)),
    "llama-llama3": ("Llama", scaled(LLAMA3)),
    "llama-yarn": ("Llama", scaled(YARN)),
    "llama-longrope": ("Llama", scaled(LONGROPE | EXTENDED)),
    # Without a factor it is the ratio of lengths; with an attention factor, neither.
    "qwen3-longrope": (
        "Qwen3",
        scaled(LONGROPE | {"original_max_position_embeddings": ORIGINAL}, head_dim=6),
    ),
    "qwen3-longrope-attention": (
        "Qwen3",
        scaled(LONGROPE | EXTENDED | {"attention_factor": 1.3}, head_dim=6),
    ),
    "phi3-longrope": (
        "Phi3",
        scaled(LONGROPE | {"partial_rotary_factor": 0.75}, **PHI3),
    ),
    "gpt_neox-dynamic": (
        "GPTNeoX",
        scaled(DYNAMIC, **SHORT)
        | {"without": ("num_key_value_heads",), "hidden_size": 48, "rotary_pct": 0.5},
    ),
    "gpt_neox-linear": (
        "GPTNeoX",
        scaled(LINEAR)
        | {"without": ("num_key_value_heads",), "hidden_size": 48, "rotary_pct": 0.5},
    ),
    "olmo3-yarn": ("Olmo3", of_full_attention(YARN, num_hidden_layers=4)),
    "gemma3-linear": ("Gemma3", of_full_attention(LINEAR, **GEMMA3)),
    "gemma3-dynamic": ("Gemma3", of_full_attention(DYNAMIC, **GEMMA3, **SHORT)),
    "gemma3-longrope": ("Gemma3", of_full_attention(LONGROPE | EXTENDED, **GEMMA3)),
}
BY_LENGTH = [name for name in CASES if "dynamic" in name or "longrope" in name]
GENERATING = ["llama-dynamic", "qwen3-longrope", "phi3-longrope", "gemma3-dynamic"]


class Case(NamedTuple):
    """A model, theirs and ours, and a batch's logits of ours."""

    pair: Pair
    logits: Callable[[Batch], np.ndarray]


@pytest.fixture(scope="module")
def get_case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a name to its case, each made and compiled once."""

    @cache
    def get(name: str) -> Case:
        family, changes = CASES[name]
        changes = {"num_hidden_layers": 2} | changes
        pair = make_pair(tmp_path_factory.mktemp(name), family, changes)
        compute = jax.jit(lambda *given: logits_of(*pair.model.apply(*given)))
        return Case(pair, lambda batch: np.asarray(compute(pair.params, batch)))

    return get


def some_tokens(count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(3, SIZES["vocab_size"], count).astype(np.int32)


def as_example(*sequences: np.ndarray, shared: int = 2) -> Example:
    """Sequences as inputs, the first `shared` tokens once; a label follows each."""
    completions = [np.append(tokens[shared:], 3) for tokens in sequences]
    return Example(sequences[0][:shared], tuple(completions))


def their_logits(theirs: Any, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Of one batch, padded on the right.

    transformers keeps dynamic frequencies for the longest sequence that a model has
    ever seen, until it sees one within its original context: here at first.
    """
    import torch

    longest = max(map(len, sequences))
    padded = [np.pad(tokens, (0, longest - len(tokens))) for tokens in sequences]
    mask = [np.arange(longest) < len(tokens) for tokens in sequences]
    with torch.no_grad():
        theirs(input_ids=torch.tensor([[1, 2]]))
        tokens = torch.tensor(np.stack(padded)).long()
        attended = torch.tensor(np.stack(mask)).long()
        logits = theirs(input_ids=tokens, attention_mask=attended).logits.numpy()
    return [row[: len(tokens)] for row, tokens in zip(logits, sequences, strict=True)]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def lay_out(*rows: list[Example]) -> Batch:
    """Always of one shape: a case compiles once."""
    filled = [*rows, *([] for _ in range(2 - len(rows)))]
    return as_batch(filled, length=64, num_slots=4, num_completions=2)


@pytest.mark.parametrize("name", CASES)
def test_sequences_within_and_beyond_the_original_context_have_transformers_logits(
    name: str, get_case: Any
):
    """Here all sequences share a row, there each is a batch of its own."""
    case: Case = get_case(name)
    sequences = [some_tokens(length, length) for length in LENGTHS]
    batch = lay_out([as_example(tokens) for tokens in sequences])
    found = case.logits(batch)
    for number, tokens in enumerate(sequences, 1):
        (expected,) = their_logits(case.pair.theirs, [tokens])
        assert expected.std() > 0.1
        assert_close(found[batch.example == number], expected)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_the_longest_branch_of_an_example_decides_as_its_own_batch_does_there(
    name: str, get_case: Any
):
    """A pair of a prompt with a short and a long answer; beside it, a longer one."""
    case: Case = get_case(name)
    prompt = some_tokens(4, 0)
    short, long = (np.append(prompt, some_tokens(count, count)) for count in (5, 20))
    pair = as_example(short, long, shared=4)
    batch = lay_out([as_example(some_tokens(30, 1)), pair])
    found, ours = case.logits(batch), batch.example == 2
    for number, expected in enumerate(their_logits(case.pair.theirs, [short, long]), 1):
        mine = [found[ours & (batch.branch == branch)] for branch in (0, number)]
        assert_close(np.concatenate(mine), expected)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_an_example_has_the_same_numbers_whatever_else_its_row_and_batch_hold(
    name: str, get_case: Any
):
    """Not so its own length: cut within the original context, its numbers change."""
    case: Case = get_case(name)
    tokens = some_tokens(30, 1)
    long, short, other = map(as_example, (tokens, some_tokens(8, 2), tokens[:10]))

    def of(number: int, row: int, *rows: list[Example]) -> np.ndarray:
        batch = lay_out(*rows)
        return case.logits(batch)[row][batch.example[row] == number]

    alone = of(1, 0, [short], [other])
    for found in (of(2, 0, [long, short], [other]), of(1, 1, [long], [short])):
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-5)
    whole, cut = of(1, 0, [long])[:10], of(1, 0, [other])
    assert np.max(np.abs(whole - cut)) > 2e-3


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_decoding_on_one_side_of_the_original_context_equals_transformers(
    name: str, get_case: Any
):
    """Under dynamic scaling each longer sequence is another side: only within it."""
    pair: Pair = get_case(name).pair
    within, beyond = ORIGINAL - NUM_NEW, ORIGINAL + 1
    for length in (within,) if "dynamic" in name else (within, beyond):
        rows = [some_tokens(length, 7).tolist(), some_tokens(length, 8).tolist()]
        found, expected = greedy(pair, rows, NUM_NEW)
        assert len(np.unique(expected)) > 2
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", GENERATING)
def test_decoding_in_steps_gives_the_logits_of_the_whole_sequence(
    name: str, get_case: Any
):
    """Though the first steps stay within the original context; the whole exceeds it."""
    case: Case = get_case(name)
    pair, tokens = case.pair, some_tokens(20, 5)
    batch = lay_out([as_example(tokens)])
    expected = case.logits(batch)[batch.example == 1]
    example, cache = jnp.ones((1, 20), jnp.int32), pair.model.empty_cache(1, 20)
    extend, found = jax.jit(pair.model.extend), []
    for first in range(0, 20, 10):
        position = jnp.arange(first, first + 10)[None]
        new = tokens[None, first : first + 10]
        hidden, output, cache = extend(
            pair.params, new, position, example, cache, first
        )
        found.append(np.asarray(logits_of(hidden[0], output)))
    assert_close(np.concatenate(found), expected)
