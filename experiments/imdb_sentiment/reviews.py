"""IMDb's reviews as text: whole, in pieces, or their beginnings. Knows no model."""

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dpojax.data.tokenize import Tokenizer

WORDS = 1.25  # words cut for each token wanted: BPE makes at least one of a word
PROMPT_TOKENS = (2, 8)  # the paper's prefixes


class Review(NamedTuple):
    """What someone wrote, and whether it praises; None: nobody said."""

    text: str
    label: int | None


def read_reviews(path: Path, most: int | None) -> list[Review]:
    """The reviews of a split without their line breaks; `most` of them at random."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)  # the files are sorted by label
    return [Review(_clean(row["text"]), row.get("label")) for row in rows[:most]]


def pieces(reviews: Sequence[Review], num_tokens: int, seed: int) -> Iterator[str]:
    """One piece of each review, from a random word on.

    Longer than the tokens wanted where the review is: what is cut off there has no end
    of sequence, so that only what ends a review does.
    """
    chooser = random.Random(seed)
    for review in reviews:
        words = review.text.split(" ")
        start = chooser.randrange(max(1, len(words) - num_tokens // 2))
        piece = words[start : start + round(WORDS * num_tokens)]
        yield (" " if start else "") + " ".join(piece)


def openings(
    reviews: Sequence[Review], tokenizer: Tokenizer, number: int, seed: int
) -> list[str]:
    """Different beginnings of reviews, of two to eight tokens."""
    chooser = random.Random(seed)
    found: dict[str, None] = {}
    for review in reviews:
        num_tokens = chooser.randint(*PROMPT_TOKENS)
        ids = tokenizer.encode(review.text[:200], add_special_tokens=False)
        text = str(tokenizer.decode(ids[:num_tokens]))
        if "\ufffd" not in text:  # a character cut in two
            found[text] = None
        if len(found) == number:
            break
    return list(found)


def _clean(text: str) -> str:
    return " ".join(text.replace("<br />", " ").split())
