"""Completions as text, and the strings that end them. Knows no cache and no logits.

A stop string may begin in the midst of a token and end in the midst of another, so it
is looked for in the text.
"""

import os.path
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dpojax.data.tokenize import Tokenizer


class Settled(NamedTuple):
    """What a completion begins with, whatever tokens are still to come."""

    text: str
    is_whole: bool  # a stop string follows, so nothing else belongs to it


Settle = Callable[[Sequence[int], Sequence[int]], Settled]  # of prompt and completion
# By how many tokens a text must have gone on before it stays as it is: a character may
# be written in four, and some tokenizers tidy "do n't" to "don't".
UNSETTLED = 4


def cut_at(text: str, stops: Sequence[str]) -> str:
    """What stands before the earliest of the strings; all of it if there is none."""
    places = [text.find(stop) for stop in stops]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def decode_completion(
    tokenizer: Tokenizer, prompt: Sequence[int], completion: Sequence[int]
) -> str:
    """What a completion adds to the text of its prompt.

    Decoded together with it: some tokenizers drop the space at the start of a text.
    """

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    before, whole = text(prompt), text([*prompt, *completion])
    # A tokenizer that tidies spaces may change the prompt's end.
    return whole[len(before) :] if whole.startswith(before) else text(completion)


def make_settle(tokenizer: Tokenizer, stops: Sequence[str]) -> Settle:
    """Builds ``settle(prompt, completion)`` for completions that are being generated.

    Whatever follows, `cut_at` gives of the whole completion what begins with the
    settled text, or is that text where this is whole.

    Args:
      tokenizer: of prompt and completion.
      stops: the strings that end a completion.
    """
    longest = max(map(len, stops), default=1)

    def settle(prompt: Sequence[int], completion: Sequence[int]) -> Settled:
        before, now = (
            decode_completion(tokenizer, prompt, some)
            for some in (completion[:-UNSETTLED], completion)
        )
        text = os.path.commonprefix([before, now])
        cut = cut_at(text, stops)
        # A stop string that begins from here on may end beyond the text.
        undecided = max(0, len(text) - longest + 1)
        return Settled(cut[:undecided], len(cut) < undecided)

    return settle
