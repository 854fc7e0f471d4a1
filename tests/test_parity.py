"""Every family against transformers: logits, rows, generation, and files both ways.

Tiny random models of torch on the CPU, float32. Sequences are longer than the sliding
windows, numbers of heads are odd, and no mesh divides the vocabulary.
"""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import SIZES, Pair, greedy, make_pair

from dpojax.batch import Batch
from dpojax.data.packing import Example, as_batch
from dpojax.log_probs import as_head, completion_log_probs, logits_of
from dpojax.models.functional import Params
from dpojax.models.huggingface import read_settings, write_model
from dpojax.routing import load_balancing_loss, over_rows

LENGTHS = [3, 14, 9, 1]
NUM_NEW = 12
WINDOW = 5
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
# Name of a case: what transformers' classes begin with, and settings beside SIZES.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-window": (
        "Qwen3",
        {
            "head_dim": 8,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "mixtral-window": (
        "Mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": WINDOW},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
        },
    ),
    "qwen3_moe-renormalised": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3-window": (
        "SmolLM3",
        {
            "no_rope_layers": [1, 0, 0, 1],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.5,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": WINDOW}),
    "olmo3-yarn": (
        "Olmo3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": ("Phi3", {}),
    "phi3-window": ("Phi3", {"sliding_window": WINDOW, "hidden_size": 48}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "config": "Gemma3TextConfig",
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gpt2": (
        "GPT2",
        {
            "model": "GPT2LMHeadModel",
            "without": ("num_key_value_heads", "intermediate_size"),
            "n_inner": 44,
        },
    ),
    "gpt_neox": (
        "GPTNeoX",
        {"without": ("num_key_value_heads",), "hidden_size": 48},
    ),
    "gpt_neox-sequential": (
        "GPTNeoX",
        {
            "without": ("num_key_value_heads",),
            "hidden_size": 48,
            "use_parallel_residual": False,
        },
    ),
    "gptj": (
        "GPTJ",
        {"without": ("num_key_value_heads", "intermediate_size"), "rotary_dim": 4},
    ),
}


WITH_EXPERTS = [case for case in CASES if case.startswith(("mixtral", "qwen3_moe"))]


@pytest.fixture(scope="module")
def get_pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a case to its models, each made once."""

    @cache
    def get(case: str) -> Pair:
        return make_pair(tmp_path_factory.mktemp(case), *CASES[case])

    return get


def tokens_of_rows() -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(3, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)))


def padded_rows() -> Batch:
    """The rows as they are, each a single sequence, padded on the right."""
    tokens = tokens_of_rows()
    index = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    example = (index < np.array(LENGTHS)[:, None]).astype(np.int32)
    zeros = np.zeros(tokens.shape, np.int32)
    lengths = np.zeros((len(LENGTHS), 1, 1), np.int32)
    return Batch(
        tokens.astype(np.int32),
        zeros,
        index.astype(np.int32) * example,
        example,
        zeros,
        lengths,
        lengths.astype(np.float32),
        np.ones((len(LENGTHS), 1), np.float32),
    )


def as_torch(batch: Batch) -> dict[str, Any]:
    import torch

    mask = torch.tensor(np.asarray(batch.example)).long()
    tokens = torch.tensor(np.asarray(batch.tokens)).long()
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, get_pair: Any):
    torch = pytest.importorskip("torch")

    pair: Pair = get_pair(case)
    batch = padded_rows()
    inside = batch.example > 0
    with torch.no_grad():
        output = pair.theirs(**as_torch(batch))
    expected = output.logits.numpy()[inside]
    compute = jax.jit(lambda params: logits_of(*pair.model.apply(params, batch)))
    found = np.asarray(compute(pair.params))[inside]
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_shared_row_gives_the_log_probs_of_separate_sequences(
    case: str, get_pair: Any
):
    pair: Pair = get_pair(case)
    random = np.random.default_rng(1)

    def some(count: int) -> np.ndarray:
        return random.integers(3, SIZES["vocab_size"], count).astype(np.int32)

    prompts, completions = (some(7), some(2)), [(some(8), some(3)), (some(1), some(9))]
    shared = [Example(p, c) for p, c in zip(prompts, completions, strict=True)]
    apart = [
        [Example(prompt, (completion,))]
        for prompt, both in zip(prompts, completions, strict=True)
        for completion in both
    ]

    def log_probs(batch: Batch) -> np.ndarray:
        compute = jax.jit(
            lambda params: completion_log_probs(*pair.model.apply(params, batch), batch)
        )
        return np.asarray(compute(pair.params)).ravel()

    one = log_probs(as_batch([shared], length=40, num_slots=2))
    several = log_probs(as_batch(apart, length=40, num_completions=1))
    np.testing.assert_allclose(one, several, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_cached_greedy_decoding_equals_that_of_transformers(case: str, get_pair: Any):
    rows = [row[:n].tolist() for row, n in zip(tokens_of_rows(), LENGTHS, strict=True)]
    found, expected = greedy(get_pair(case), rows, NUM_NEW)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_written_as_transformers_wrote_it(
    case: str, get_pair: Any, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    pair: Pair = get_pair(case)
    settings = read_settings(pair.directory)
    write_model(tmp_path / "ours", pair.params, settings, lambda _: None)
    one, other = (
        load_file(directory / "model.safetensors")
        for directory in (tmp_path / "ours", pair.directory)
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        np.testing.assert_array_equal(tensor, other[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", output_loading_info=True
        )
    _, report = loaded
    assert not any(report.values())


@pytest.mark.parametrize("case", WITH_EXPERTS)
def test_the_load_balancing_loss_and_its_gradient_equal_those_of_transformers(
    case: str, get_pair: Any
):
    torch = pytest.importorskip("torch")

    pair: Pair = get_pair(case)
    batch = padded_rows()
    expected = pair.theirs(**as_torch(batch), output_router_logits=True).aux_loss
    routers = [layer.mlp.gate.weight for layer in pair.theirs.model.layers]
    slopes = [slope.numpy() for slope in torch.autograd.grad(expected, routers)]

    def balance(params: Params) -> jax.Array:
        routing = as_head(pair.model.apply(params, batch)[1]).routing
        assert routing is not None
        return load_balancing_loss(over_rows(routing))

    found, gradient = jax.jit(jax.value_and_grad(balance))(pair.params)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    kernel = gradient["blocks"]["experts"]["router"]["kernel"]
    assert np.abs(kernel).max() > 1e-3
    np.testing.assert_allclose(kernel.swapaxes(1, 2), slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["gemma2", "smollm3-window", "gpt2", *WITH_EXPERTS])
def test_gradients_are_finite(case: str, get_pair: Any):
    pair: Pair = get_pair(case)
    example = Example(np.arange(3, 9, dtype=np.int32), (np.array([5, 2], np.int32),))
    batch = as_batch([[example]], length=12)

    def total(params: Params) -> jax.Array:
        return jnp.sum(completion_log_probs(*pair.model.apply(params, batch), batch))

    for gradient in jax.tree.leaves(jax.jit(jax.grad(total))(pair.params)):
        assert np.isfinite(gradient).all()
