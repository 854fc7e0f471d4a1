"""Writes what every library is timed on: weights, and the same pairs in the same order.

Command: python experiments/benchmarks/prepare.py --output DIRECTORY --shape 4x256
(`compare.py` runs it.)

The directory gets ``model`` (a Hugging Face directory of random weights, with a
tokenizer), ``examples.jsonl`` (token ids of all pairs, which dpojax draws batches from)
and ``batches.jsonl`` (the pairs that dpojax draws, in its order, for libraries that
take them as they come).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from dpojax.bench_inputs import make_pairs, make_random_model
from dpojax.command_config import BenchConfig, ShapeConfig
from dpojax.data.loader import training_batches
from dpojax.data.packing import Example
from dpojax.data.synthetic import make_tokenizer
from dpojax.data.tokenize import Tokenizer, load_tokenizer
from dpojax.examples import load_examples
from dpojax.losses.make import make_loss
from dpojax.models.huggingface import write_model
from dpojax.sharding import make_mesh
from dpojax.whole_files import write_json_lines


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What to write."""

    output: Path  # new
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    data: str | None = None  # preferences as text; None: pairs of random tokens
    tokenizer: str | None = None  # for data
    max_length: int = 512  # of a prompt and one completion of data
    prompt_tokens: int = 64
    completion_tokens: int = 64
    spread: float = 0.0
    batch_size: int = 8
    steps: int = 13
    seed: int = 0


def main(inputs: Inputs) -> None:
    """Writes the directory."""
    config = BenchConfig(
        shape=inputs.shape,
        prompt_tokens=inputs.prompt_tokens,
        completion_tokens=inputs.completion_tokens,
        spread=inputs.spread,
        batch_size=inputs.batch_size,
        steps=inputs.steps,
        unmeasured_steps=0,
        seed=inputs.seed,
    )
    loaded = make_random_model(config, make_mesh())
    vocabulary = loaded.model.config.vocabulary_size
    tokenizer = make_tokenizer()
    if inputs.data is None:
        examples = make_pairs(config, vocabulary)
    else:
        assert inputs.tokenizer is not None
        tokenizer = load_tokenizer(inputs.tokenizer)
        every = read(inputs.data, tokenizer, inputs.max_length)
        # No more than the steps take: a precomputed reference looks at all of them.
        random = np.random.default_rng(inputs.seed)
        chosen = random.permutation(len(every))[: inputs.batch_size * inputs.steps]
        examples = [every[place] for place in chosen]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_theta": 1_000_000.0,  # Tunix 0.1.7 has this one, whatever the config says
    }
    largest = max(max(tokenizer.get_vocab().values()), most(examples))
    if largest >= vocabulary:
        raise ValueError(f"There is a token {largest}; give --shape.vocabulary.")
    write_model(
        inputs.output / "model",
        loaded.params,
        loaded.settings | settings,
        tokenizer.save_pretrained,
    )
    write_json_lines(inputs.output / "examples.jsonl", as_rows(examples))
    drawn = [
        examples[index]
        for index in order(examples, inputs.batch_size, inputs.steps, inputs.seed)
    ]
    write_json_lines(inputs.output / "batches.jsonl", as_rows(drawn))


def read(data: str, tokenizer: Tokenizer, max_length: int) -> Sequence[Example]:
    return load_examples(
        [data], make_loss("dpo"), tokenizer, split="train", max_length=max_length
    )


def order(
    examples: Sequence[Example], batch_size: int, num_steps: int, seed: int
) -> Iterator[int]:
    """Which examples the batches of training hold, found in the batches themselves."""
    numbered = [
        example._replace(scores=(float(number), 0.0))
        for number, example in enumerate(examples)
    ]
    for batch in training_batches(
        numbered,
        batch_size=batch_size,
        num_seen=batch_size * num_steps,
        seed=seed,
        start=0,
        stop=num_steps,
    ):
        yield from np.asarray(batch.score)[batch.live][:, 0].astype(int).tolist()


def most(examples: Iterable[Example]) -> int:
    return max(
        int(tokens.max())
        for example in examples
        for tokens in (example.prompt, *example.completions)
    )


def as_rows(examples: Iterable[Example]) -> Iterator[dict[str, list[int]]]:
    names = "prompt_ids", "chosen_ids", "rejected_ids"
    for example in examples:
        parts = (example.prompt, *example.completions)
        yield {name: part.tolist() for name, part in zip(names, parts, strict=True)}


if __name__ == "__main__":
    main(tyro.cli(Inputs))
