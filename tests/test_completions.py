"""Completions as text, and the strings that end them, whatever the tokenizer."""

import string

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from dpojax.completions import (
    UNSETTLED,
    cut_at,
    decode_completion,
    make_settle,
)
from dpojax.data.synthetic import make_tokenizer
from dpojax.data.tokenize import Tokenizer, encode_prompt

TEXT = "I saw 🎬 one , two and don't say théâtre n't . Isn 't it naïve ? "


def of_bytes() -> Tokenizer:
    """A token for each byte: most characters of TEXT take one, some two or four."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def of_characters() -> Tokenizer:
    """A token for each character; `transformers` tidies the spaces of its texts."""
    letters = sorted({*TEXT, *string.ascii_letters})
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    raw = RawTokenizer(models.WordLevel(vocab=vocabulary, unk_token=" "))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, clean_up_tokenization_spaces=True
    )


def of_pieces() -> Tokenizer:
    """SentencePiece's kind: words with their spaces, the text's first one dropped."""
    words = ["▁I", "▁saw", "▁one", "▁two", "▁", "t", "wo▁an", "d", "."]
    vocabulary = {word: number for number, word in enumerate(words)}
    raw = RawTokenizer(models.WordLevel(vocab=vocabulary, unk_token="."))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def make_row(tokenizer: Tokenizer, seed: int) -> tuple[list[int], list[int]]:
    """A prompt, and a completion: parts of TEXT, or any tokens at all."""
    draw = np.random.default_rng(seed)
    anything = draw.integers(0, len(tokenizer.get_vocab()), 60).tolist()
    start = int(draw.integers(0, len(TEXT)))
    known = encode_prompt(TEXT[start:] + TEXT, tokenizer)
    return known[:9], known[9:60] if seed % 2 else anything


@pytest.mark.parametrize(
    "tokenizer",
    [of_bytes(), of_characters(), of_pieces(), make_tokenizer()],
    ids=["bytes", "characters", "pieces", "embedded"],
)
def test_settled_text_is_what_the_whole_completion_begins_with(
    tokenizer: Tokenizer,
):
    """Of completions at all lengths; the stop strings are parts of what they say."""
    num_whole = num_settled = 0
    for seed in range(40):
        prompt, completion = make_row(tokenizer, seed)
        everything = decode_completion(tokenizer, prompt, completion)
        draw = np.random.default_rng(seed)
        places = [int(place) for place in draw.integers(0, len(everything), 2)]
        sizes = (1, 5) if seed % 3 else (1, 3)
        stops = [
            everything[place : place + size]
            for place, size in zip(places, sizes, strict=True)
        ]
        settle = make_settle(tokenizer, stops if seed % 4 else [])
        expected = cut_at(everything, stops if seed % 4 else [])
        for length in range(len(completion)):
            text, is_whole = settle(prompt, completion[:length])
            assert text == expected if is_whole else expected.startswith(text)
            num_whole += is_whole
            num_settled += len(text) > 5
    assert num_whole > 200 and num_settled > 500


def test_a_completion_is_whole_soon_after_its_stop_string():
    tokenizer = of_bytes()
    settle = make_settle(tokenizer, ["stop"])
    completion = encode_prompt("now stop! and some more", tokenizer)
    found = [settle([], completion[:n]) for n in range(24)]
    whole = [n for n in range(24) if found[n].is_whole]
    assert whole == list(range(len("now stop") + UNSETTLED, 24))
    assert found[10].text == "now"  # of "now st", where "stop" may begin
    assert found[-1].text == "now "


def test_a_stop_string_that_another_may_still_precede_does_not_count_yet():
    tokenizer = of_bytes()
    settle = make_settle(tokenizer, ["c", "bcdefghij"])
    completion = encode_prompt("abcdefghijklmnop", tokenizer)
    assert settle([], completion[:9]) == ("", False)
    assert settle([], completion) == ("a", True)


def test_what_is_tidied_away_is_no_stop_string():
    """The space before n't is there until the t is."""
    tokenizer = of_characters()
    settle = make_settle(tokenizer, [" n"])
    completion = encode_prompt("I do n't know what to say", tokenizer)
    assert decode_completion(tokenizer, [], completion[:6]) == "I do n"
    lengths = range(len(completion) + 1)
    found = [settle([], completion[:n]) for n in lengths]
    assert not any(is_whole for _, is_whole in found)
    assert found[-1].text == "I don't know what t"


def test_the_earliest_of_several_stop_strings_counts():
    assert cut_at("one two three", ("three", "two")) == "one "
    assert cut_at("one two three", ("two three", "e")) == "on"
    assert cut_at("one", ("four",)) == "one" == cut_at("one", ())
    assert cut_at("one", ("one",)) == ""


def test_a_completion_is_what_it_adds_to_the_text_of_its_prompt():
    tokenizer = make_tokenizer()
    prompt, whole = "I saw this film", "I saw this film and it was good."
    ids, all_ids = (encode_prompt(text, tokenizer) for text in (prompt, whole))
    assert all_ids[: len(ids)] == ids
    added = decode_completion(tokenizer, ids, all_ids[len(ids) :])
    assert prompt + added == whole
