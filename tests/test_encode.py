"""Many texts at a time: the same ids in the same order, and few records in memory."""

from collections.abc import Iterator
from typing import Any

import pytest

from dpojax.data import encode as encode_module
from dpojax.data.encode import encode, encode_ahead
from dpojax.data.fields import Record
from dpojax.data.flat_examples import ExampleWriter
from dpojax.data.packing import Example
from dpojax.data.synthetic import make_reviews, make_tokenizer
from dpojax.data.tokenize import tokenize_records

TEXTS = [*make_reviews(20, seed=0), "", "<bos>The food<eos>", "unknown words"]


@pytest.mark.parametrize("split_special", [False, True])
def test_ids_are_those_of_the_tokenizer_called_alone(split_special: bool):
    tokenizer = make_tokenizer()
    tokenizer.split_special_tokens = split_special
    expected = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS
    ]
    # A call before may have left a limit and padding behind.
    tokenizer(TEXTS, truncation=True, max_length=3, padding="max_length")
    assert encode(tokenizer, TEXTS) == expected
    assert encode(tokenizer, []) == []


@pytest.mark.parametrize("window", [1, 3, 100])
def test_items_come_in_order_each_with_its_own_texts(
    window: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encode_module, "_WINDOW", window)
    tokenizer = make_tokenizer()
    items = list(range(10))

    def texts_of(item: int) -> list[str]:
        return TEXTS[item : item + item % 3]

    found = list(encode_ahead(tokenizer, items, texts_of))
    assert found == [(item, encode(tokenizer, texts_of(item))) for item in items]
    assert list(encode_ahead(tokenizer, [], texts_of)) == []


def test_of_many_records_few_are_in_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encode_module, "_WINDOW", 4)
    made, written, most = 0, 0, 0

    class Counting(ExampleWriter):
        def append(self, example: Example) -> None:
            nonlocal written, most
            written, most = written + 1, max(most, made - written)
            super().append(example)

    def records() -> Iterator[Record]:
        nonlocal made
        while made < 100:
            made += 1
            yield Record("The food", (" was good", " was bad"), f"line {made}")

    examples, _ = tokenize_records(records(), make_tokenizer(), writer=Counting())
    assert len(examples) == 100 and most <= 3 * 4


def test_what_fails_among_later_records_is_raised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encode_module, "_WINDOW", 2)

    def items() -> Iterator[Any]:
        yield from range(5)
        raise ValueError("line 6 is not JSON")

    with pytest.raises(ValueError, match="line 6 is not JSON"):
        list(encode_ahead(make_tokenizer(), items(), lambda item: ["good"] * item))
