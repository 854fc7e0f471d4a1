"""Gradients of the DPO loss against torch's, parameter by parameter.

Here pairs share their prompt and their rows, and the step is the one of training; there
each sequence is computed by itself and padded. The gradient is written as if it were a
model and read by transformers, which gives each tensor the name that torch knows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import Pair, keep_gradient, make_pair

from dpojax.data.packing import Example, as_batch
from dpojax.losses.make import make_loss
from dpojax.models.huggingface import read_settings, write_model
from dpojax.train_step import init_state, make_train_step

BETA = 0.5
# Prompt, chosen and rejected, of many lengths; characters are the tokens.
PAIRS = [
    ("Q: Is the earth flat?\nA:", " No, it is round.", " Yes."),
    ("Say hello.", " Hello!", " I would rather not say anything to you today."),
    ("2+2=", "4", "5, or perhaps 6"),
    ("How do I make tea? ", "Boil water; pour it over the leaves; wait.", "No idea"),
]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3",
        {
            "config": "Gemma3TextConfig",
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt2": (
        "GPT2",
        {
            "model": "GPT2LMHeadModel",
            "without": ("num_key_value_heads", "intermediate_size"),
            "n_inner": 44,
            "embd_pdrop": 0.0,
        },
    ),
    "gpt_neox": ("GPTNeoX", {"without": ("num_key_value_heads",), "hidden_size": 48}),
}


def as_tokens(text: str) -> np.ndarray:
    """Printable characters, and the end of a line, as 2 to 97."""
    printable = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32) - 30
    return np.where(printable < 0, 1, printable).astype(np.int32)


def as_example(prompt: str, *completions: str) -> Example:
    ends = np.array([0], np.int32)
    tokens = [np.append(as_tokens(text), ends) for text in completions]
    return Example(as_tokens(prompt), tuple(tokens))


def our_gradient(
    policy: Pair, reference: Pair, directory: Path
) -> dict[str, np.ndarray]:
    """By torch's names."""
    examples = [as_example(*pair) for pair in PAIRS]
    rows = [[examples[0], examples[2]], [examples[1]], [examples[3]]]
    batch = as_batch(rows, length=128, num_slots=2)
    loss, optimizer = make_loss("dpo", beta=BETA), keep_gradient()
    step = make_train_step(policy.model.apply, loss, optimizer, chunk_size=64)
    state = init_state(policy.params, optimizer, loss)
    state, _ = step(state, reference.params, batch)
    settings = read_settings(policy.directory)
    write_model(directory, state.opt_state, settings, lambda _: None)
    read = type(policy.theirs).from_pretrained(directory)
    return {name: p.detach().numpy() for name, p in read.named_parameters()}


def their_log_probs(theirs: Any) -> Any:
    """Of each completion: ``[pairs, 2]``."""
    import torch

    sequences, first = [], []
    for prompt, *completions in PAIRS:
        example = as_example(prompt, *completions)
        for completion in example.completions:
            sequences.append(np.concatenate([example.prompt, completion]))
            first.append(len(example.prompt))
    longest = max(map(len, sequences))
    padded = np.stack([np.pad(s, (0, longest - len(s))) for s in sequences])
    lengths = np.array([[len(tokens)] for tokens in sequences])
    index = np.arange(longest)
    tokens = torch.tensor(padded).long()
    mask = torch.tensor(index < lengths).long()
    logits = theirs(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    of_labels = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    scored = (index >= np.array(first)[:, None]) & (index < lengths)
    return (of_labels * torch.tensor(scored[:, 1:])).sum(-1).reshape(-1, 2)


def their_gradient(policy: Any, reference: Any) -> dict[str, np.ndarray]:
    import torch

    with torch.no_grad():
        frozen = their_log_probs(reference)
    rewards = BETA * (their_log_probs(policy) - frozen)
    margin = rewards[:, 0] - rewards[:, 1]
    torch.nn.functional.softplus(-margin).mean().backward()
    return {name: p.grad.numpy() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_dpo_is_torchs_in_every_parameter(case: str, tmp_path: Path):
    family, changes = CASES[case]
    changes = {
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
    } | changes
    policy, reference = (
        make_pair(tmp_path / f"{seed}", family, changes, seed=seed) for seed in (0, 1)
    )
    found = our_gradient(policy, reference, tmp_path / "gradient")
    expected = their_gradient(policy.theirs, reference.theirs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = np.linalg.norm(gradient)
        assert size > 0, name
        assert np.linalg.norm(found[name] - gradient) < 1e-4 * size, name
