"""What a benchmark runs on where it is given no model or no data.

Models of known shapes with random weights, pairs of random tokens, and pairs of token
ids from a file. This file knows neither steps nor clocks.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpojax.command_config import BenchConfig, ShapeConfig
from dpojax.data.packing import Example
from dpojax.data.synthetic import make_tokenizer
from dpojax.loading import Loaded
from dpojax.models.decoder import make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.lora import graft
from dpojax.placing import make_adapters, make_kept_model
from dpojax.policy import configured_keeping
from dpojax.prepare import make_new_adapters
from dpojax.sharding import as_shardings

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 131_072,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
}
_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "4x256": _LLAMA
    | {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "vocab_size": 4096,
    },
    "8x512": _LLAMA
    | {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": 32_000,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "max_position_embeddings": 131_072,
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151_936,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": _LLAMA
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": _LLAMA
    | {
        "max_position_embeddings": 8192,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
    },
}


def shape_settings(shape: ShapeConfig) -> dict[str, Any]:
    """The ``config.json`` of a shape.

    Raises:
      ValueError: for changes of no shape.
    """
    changes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads or shape.heads,
        "intermediate_size": shape.mlp_width,
        "vocab_size": shape.vocabulary,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    if shape.name is None:
        raise ValueError(
            f"A benchmark needs a --model, or one of --shape {', '.join(_SHAPES)}."
        )
    return {**_SHAPES[shape.name], **given}


def make_random_model(config: BenchConfig, mesh: Mesh) -> Loaded:
    """A model of the given shape whose weights the seed decides.

    Raises:
      ValueError: for a shape that cannot be, or a quantised base.
    """
    if config.lora.base in ("int8", "nf4"):
        raise ValueError(
            f"--lora.base {config.lora.base} needs weights to quantise; give --model."
        )
    settings = shape_settings(config.shape)
    shape, lora = as_decoder_config(settings), None
    new_adapters = make_new_adapters(config.lora)
    if new_adapters is not None:
        lora = new_adapters(make_model(shape).params, settings)
        lora = replace(lora, dropout=config.lora.dropout)
    model = make_kept_model(shape, configured_keeping(config, mesh), lora)
    where = as_shardings(model.params, mesh)
    params = jax.jit(model.init, out_shardings=where)(jax.random.key(config.seed))
    if lora is not None:
        params = graft(params, make_adapters(model, params, mesh, config.seed))
    # Nothing is read or written as text; a tokenizer is part of what is loaded.
    tokenizer = make_tokenizer()
    return Loaded(model, params, settings, tokenizer, 0, str(config.shape.name))


def make_pairs(config: BenchConfig, vocabulary: int) -> list[Example]:
    """Pairs of random tokens, one for each place of a batch.

    Raises:
      ValueError: for lengths that cannot be.
    """
    if config.prompt_tokens < 1 or config.completion_tokens < 1 or config.spread < 0:
        raise ValueError(
            f"prompt_tokens is {config.prompt_tokens}, completion_tokens "
            f"{config.completion_tokens} and spread {config.spread}; lengths must be "
            "positive and the spread not negative."
        )
    generator = np.random.default_rng(config.seed)
    number = config.batch_size * (config.unmeasured_steps + (config.steps or 0))

    def lengths(mean: int) -> np.ndarray:
        # The mean of a lognormal is exp(mu + sigma^2 / 2).
        factor = generator.lognormal(-(config.spread**2) / 2, config.spread, number)
        return np.clip(np.rint(mean * factor), 1, 4 * mean).astype(int)

    def tokens(length: int) -> np.ndarray:
        return generator.integers(1, vocabulary, length, np.int32)

    prompts = lengths(config.prompt_tokens)
    chosen, rejected = (lengths(config.completion_tokens) for _ in range(2))
    return [
        Example(tokens(prompt), (tokens(first), tokens(second)))
        for prompt, first, second in zip(prompts, chosen, rejected, strict=True)
    ]


def read_pairs(path: Path, vocabulary: int) -> list[Example]:
    """Pairs of token ids, one JSON object a line.

    Raises:
      ValueError: for a file or line that is not as it should be, naming it.
    """
    if not path.is_file():
        raise ValueError(f"There is no token file {path}.")
    examples = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            ids = [row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
            prompt, chosen, rejected = (np.asarray(part, np.int32) for part in ids)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is not an object of prompt_ids, chosen_ids and "
                f"rejected_ids: {error}."
            ) from error
        parts = (prompt, chosen, rejected)
        most = max(part.max(initial=0) for part in parts)
        if min(part.size for part in parts) == 0 or most >= vocabulary:
            raise ValueError(
                f"{path}, line {number} has an empty list or the token {most}, and the "
                f"model has a vocabulary of {vocabulary}."
            )
        examples.append(Example(prompt, (chosen, rejected)))
    return examples
