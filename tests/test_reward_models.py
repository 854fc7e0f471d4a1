"""Reward models: read as transformers reads them, made of causal ones, written back.

Tiny random models, on a mesh of four devices.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from dpojax.data.packing import Example
from dpojax.loading import Loaded, as_reward_examples, load_model, load_reward_model
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config, as_reward_settings, as_settings
from dpojax.models.family_table import FAMILIES
from dpojax.models.functional import Params
from dpojax.models.huggingface import read_settings, write_model
from dpojax.placing import Keeping
from dpojax.scoring import make_score_step, score_examples
from dpojax.sharding import make_mesh, make_placement

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
# Name of a case: what transformers' classes begin with, and settings beside SIZES;
# `without` are those of SIZES that the family does not have.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 3}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    ),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {"bos_token_id": 1, "eos_token_id": 2}),
    "olmo2": ("Olmo2", {"eos_token_id": 2}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.1},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt2": (
        "GPT2",
        {
            "without": ("num_key_value_heads", "intermediate_size"),
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": (
        "GPTNeoX",
        {"without": ("num_key_value_heads",), "bos_token_id": 1, "eos_token_id": 2},
    ),
}


def make_theirs(variant: str, ending: str, **changes: Any) -> Any:
    """A random model of transformers; biases and norms are random too."""
    torch = pytest.importorskip("torch")
    import transformers

    family, own = (VARIANTS | OTHERS)[variant]
    without = {"without", *own.get("without", ())}
    settings = {k: v for k, v in (SIZES | own | changes).items() if k not in without}
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}{ending}")(config).eval()
    for name, parameter in theirs.named_parameters():
        if re.search("bias$|norm|ln_", name):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return theirs


def make_their_rewards(variant: str, directory: Path, padding: int = 0) -> Any:
    """A classifier of one label, saved with a tokenizer."""
    settings = {"pad_token_id": padding, "num_labels": 1}
    theirs = make_theirs(variant, "ForSequenceClassification", **settings)
    theirs.save_pretrained(directory)
    save_tokenizer(directory)
    return theirs


def save_tokenizer(directory: Path, **special: str) -> None:
    """A tokenizer of 96 words, 0 to 95; EOS is 2."""
    vocabulary = {str(number): number for number in range(96)}
    raw = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="3"))
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="2", **special)
    fast.save_pretrained(directory)


def make_sequences(pairs: int = 3) -> list[Example]:
    """Prompts, each with completions of several lengths that end with EOS."""
    random = np.random.default_rng(0)

    def tokens(count: int, *end: int) -> np.ndarray:
        return np.array([*random.integers(4, 96, count), *end], np.int32)

    return [
        Example(tokens(3 + index), (tokens(9 - index, 2), tokens(index, 2)))
        for index in range(1, 1 + pairs)
    ]


def our_scores(loaded: Loaded, examples: list[Example]) -> np.ndarray:
    scores = score_examples(
        make_score_step(loaded.model.apply),
        loaded.params,
        as_reward_examples(examples, loaded),
        batch_size=4,
        placement=make_placement(make_mesh()),
    )
    return np.concatenate(scores)


def their_scores(theirs: Any, examples: list[Example]) -> np.ndarray:
    """Of all completions in one batch, padded on the right."""
    import torch

    sequences = [
        torch.tensor(np.concatenate([example.prompt, completion]))
        for example in examples
        for completion in example.completions
    ]
    padding = theirs.config.pad_token_id
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    tokens = pad(sequences, padding_value=padding)
    mask = pad([torch.ones_like(sequence) for sequence in sequences])
    with torch.no_grad():
        logits = theirs(input_ids=tokens, attention_mask=mask).logits
    assert logits.shape == (len(sequences), 1)
    return logits[:, 0].float().numpy()


def load_rewards(directory: Path, seed: int | None = None) -> Loaded:
    name, mesh = str(directory), make_mesh(data=2, fsdp=2)
    return load_reward_model(name, Keeping(mesh, "float32"), seed=seed)


def assert_same(one: Params, other: Params) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_same_scores(found: np.ndarray, expected: np.ndarray) -> None:
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "padding"),
    [(v, p) for v in VARIANTS for p in (0, 2)] + [(v, 0) for v in OTHERS],
)
def test_a_reward_model_of_transformers_gives_its_scores(
    variant: str, padding: int, tmp_path: Path
):
    theirs = make_their_rewards(variant, tmp_path, padding)
    examples = make_sequences()
    found = our_scores(load_rewards(tmp_path), examples)
    assert_same_scores(found, their_scores(theirs, examples))


@pytest.mark.parametrize(
    ("variant", "special", "padding"),
    [
        ("llama", {}, 2),
        ("llama", {"pad_token": "1"}, 1),
        ("qwen2-tied", {"pad_token": "1"}, 1),
    ],
)
def test_transformers_loads_a_reward_model_made_of_a_causal_one(
    variant: str, special: dict[str, str], padding: int, tmp_path: Path
):
    """Its padding token is the tokenizer's, or EOS where there is none."""
    make_theirs(variant, "ForCausalLM").save_pretrained(tmp_path / "causal")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    save_tokenizer(tmp_path / "causal", **special)
    ours = load_rewards(tmp_path / "causal", seed=3)
    save = ours.tokenizer.save_pretrained
    write_model(tmp_path / "reward", ours.params, ours.settings, save)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    written = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert theirs.config.pad_token_id == written.pad_token_id == padding
    examples = make_sequences()
    assert_same_scores(our_scores(ours, examples), their_scores(theirs, examples))
    again = load_rewards(tmp_path / "reward")
    assert_same(again.params, ours.params)
    assert again.model.config == ours.model.config


def test_a_reward_model_read_from_transformers_is_written_back_as_it_was(
    tmp_path: Path,
):
    make_their_rewards("qwen2", tmp_path / "theirs")
    ours = load_rewards(tmp_path / "theirs")
    write_model(tmp_path / "ours", ours.params, ours.settings, lambda _: None)
    assert read_settings(tmp_path / "ours") == read_settings(tmp_path / "theirs")
    one, other = (
        load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs")
    )
    assert_same(one, other)
    assert one["score.weight"].shape == (1, 32)


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    """A causal model with its own output matrix."""
    config = as_decoder_config({"model_type": "llama"} | SIZES)
    params = jax.jit(make_model(config).init)(jax.random.key(1))
    directory = tmp_path / "causal"
    write_model(directory, params, as_settings(config), save_tokenizer)
    return directory


@pytest.fixture
def reward(causal: Path, tmp_path: Path) -> Path:
    """A reward model made of the causal one, in a directory of its own."""
    made = load_rewards(causal, seed=0)
    save = made.tokenizer.save_pretrained
    write_model(tmp_path / "reward", made.params, made.settings, save)
    return tmp_path / "reward"


def test_of_a_causal_model_all_but_the_head_is_kept_and_a_seed_decides_the_head(
    causal: Path,
):
    before = load_model(str(causal), Keeping(make_mesh(), "float32")).params
    first, again, other = (load_rewards(causal, seed).params for seed in (0, 0, 1))
    assert first.keys() == before.keys() - {"output"} | {"score"}
    for name in first.keys() & before.keys():
        assert_same(first[name], before[name])
    assert_same(first, again)
    heads = [np.asarray(params["score"]["embedding"]) for params in (first, other)]
    assert (heads[0] != heads[1]).all()
    assert 0.5 < heads[0].std() * 33**0.5 < 1.5


def test_a_causal_model_gives_no_reward_and_a_reward_model_no_tokens(
    causal: Path, reward: Path
):
    with pytest.raises(ValueError, match="is a causal language model, which gives no"):
        load_rewards(causal)
    with pytest.raises(ValueError, match="is a reward model, which predicts no tokens"):
        load_model(str(reward), Keeping(make_mesh()))


def test_the_classes_of_the_table_are_those_of_transformers():
    pytest.importorskip("torch")
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    rewards = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    for family in FAMILIES:
        known = {causal[family]: "vocabulary"}
        if family in rewards:
            known[rewards[family]] = "score"
        for name, head in known.items():
            # GPT-J turns 64 of a head's dimensions, where nothing is said.
            sizes = SIZES | {"hidden_size": 256}
            settings = {"model_type": family, "architectures": [name], **sizes}
            config = as_decoder_config(settings | {"num_labels": 1})
            assert config.head == head


def test_a_family_without_reward_models_in_transformers_is_refused_by_name():
    settings = {"model_type": "granite", **SIZES}
    named = {"architectures": ["GraniteForSequenceClassification"]}
    with pytest.raises(ValueError, match="GraniteForSequenceClassification.*reads one"):
        as_decoder_config(settings | named)
    with pytest.raises(ValueError, match="has no reward model of Granite"):
        as_reward_settings(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score.weight": None}, r"lacks the tensor score\.weight"),
        (
            {"score.weight": np.zeros((2, 32), np.float32)},
            r"score\.weight has shape \(2, 32\), but .* asks for \(1, 32\)",
        ),
        (
            {"lm_head.weight": np.zeros((100, 32), np.float32)},
            r"does not account for: lm_head\.weight",
        ),
    ],
)
def test_a_reward_model_whose_head_does_not_fit_is_refused(
    reward: Path, changes: dict[str, np.ndarray | None], message: str
):
    path = reward / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path)
    with pytest.raises(ValueError, match=message):
        load_rewards(reward)
