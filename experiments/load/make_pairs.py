"""Synthetic pairs of ragged length as JSON Lines, as many as wanted.

    python experiments/load/make_pairs.py pairs.jsonl --tokenizer FILE [--count 1000000]

Lengths are log-normal, by default as those of HH-RLHF are. Words are those of the
tokenizer's vocabulary, by Zipf's law in the order of its merges; of five words one is
made of two, so that not every word is a token.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dpojax.data.tokenize import load_tokenizer

SPREAD = 0.7  # of the logarithm of lengths
MOST_WORDS = 1_000
CHUNK = 10_000  # pairs


def read_words(tokenizer: str) -> np.ndarray:
    """Whole words of a byte-level vocabulary, the most frequent first."""
    vocabulary = load_tokenizer(tokenizer, "<|endoftext|>").get_vocab()
    words = [
        token[1:]
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        if token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha()
    ]
    halves = np.array(words)
    rng = np.random.default_rng(0)
    made = np.char.add(rng.permutation(halves), rng.permutation(halves))
    is_made = rng.random(len(words)) < 0.2
    return np.where(is_made, made, halves)


def write_pairs(
    path: Path, count: int, words: np.ndarray, prompt: int, completion: int
) -> None:
    """Writes pairs of so many words, the median of prompts and of completions."""
    rng = np.random.default_rng(1)
    weights = 1 / np.arange(10, len(words) + 10)
    weights /= weights.sum()
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, count, CHUNK):
            number = min(CHUNK, count - start)
            kinds = {"prompt": prompt, "chosen": completion, "rejected": completion}
            texts = {
                name: _texts(rng, number, median, words, weights)
                for name, median in kinds.items()
            }
            for row in zip(*texts.values(), strict=True):
                file.write(json.dumps(dict(zip(texts, row, strict=True))) + "\n")


def _texts(
    rng: np.random.Generator,
    count: int,
    median: int,
    words: np.ndarray,
    weights: np.ndarray,
) -> list[str]:
    lengths = np.exp(rng.normal(np.log(median), SPREAD, count)).astype(int)
    lengths = np.clip(lengths, 1, MOST_WORDS)
    drawn = words[rng.choice(len(words), lengths.sum(), p=weights)]
    return [" ".join(part) + "." for part in np.split(drawn, lengths.cumsum()[:-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--prompt-words", type=int, default=100, help="their median")
    parser.add_argument("--completion-words", type=int, default=30, help="the same")
    given = parser.parse_args()
    medians = (given.prompt_words, given.completion_words)
    write_pairs(given.output, given.count, read_words(given.tokenizer), *medians)


if __name__ == "__main__":
    main()
