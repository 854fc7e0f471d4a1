"""Completions as text, and the strings that end them. Knows no cache and no logits.

A stop string may begin in the midst of a token and end in the midst of another, so it
is looked for in the text.
"""

from collections.abc import Callable, Sequence

from dpojax.data.tokenize import Tokenizer

# (prompt, completion so far) -> whether the rest of the completion is not needed
HasStopped = Callable[[Sequence[int], Sequence[int]], bool]
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


def make_has_stopped(tokenizer: Tokenizer, stops: Sequence[str]) -> HasStopped:
    """Builds a function that says when `cut_at` cuts a completion where it ever will.

    Args:
      tokenizer: of prompt and completion.
      stops: at least one string.
    """
    longest = max(map(len, stops))

    def has_stopped(prompt: Sequence[int], completion: Sequence[int]) -> bool:
        settled = decode_completion(tokenizer, prompt, completion[:-UNSETTLED])
        cut = cut_at(settled, stops)
        if len(cut) + longest > len(settled):  # another may begin before it
            return False
        return cut == cut_at(decode_completion(tokenizer, prompt, completion), stops)

    return has_stopped
