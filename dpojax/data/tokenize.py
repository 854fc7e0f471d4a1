"""A record to token ids: chat template, beginning and end, truncation, boundaries.

Prompt and completion are tokenised apart, so no merge crosses the boundary and the
policy sees in training exactly the prompt that it is given when it generates. Every
prompt begins with BOS once where the tokenizer has one to add; every completion ends
with EOS once. Rows and batches are not this file's concern.
"""

import gc
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer as RawTokenizer
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
)

from dpojax.data.bad_records import BadRecords, usable
from dpojax.data.chats import (
    Piece,
    Rendered,
    Tokenizer,
    Turns,
    check_text,
    render,
)
from dpojax.data.conversions import ConversionCounts
from dpojax.data.encode import MISFIT, encode, encode_ahead, refusing_failure
from dpojax.data.fields import Record, Text
from dpojax.data.flat_examples import ExampleWriter, FlatExamples
from dpojax.data.packing import Example
from dpojax.data.tokenizer_files import check_files, check_templates

# Containers. What is made of a few windows of records, none of it in cycles, is fewer.
_COLLECTED_TOGETHER = 100_000
# Characters. Decompressed, a small file can fill the memory.
_LARGEST_FILE = 2**28
TooLong = Literal["truncate", "drop"]


class Counts(NamedTuple):
    """What became of the records; shown before training."""

    records: int
    examples: int
    truncated_prompts: int
    truncated_completions: int  # these lost their EOS
    dropped_too_long: int
    dropped_identical: int  # all completions of a record are the same tokens
    dropped_unscored: int = 0  # nothing of a completion is the assistant's


def describe(counts: Counts | ConversionCounts) -> str:
    """The counts in words."""
    pairs = (f"{count} {name}" for name, count in counts._asdict().items())
    return ", ".join(pairs).replace("_", " ")


def load_tokenizer(source: str | Path, eos_token: str | None = None) -> Tokenizer:
    """Loads a tokenizer that is fit for training.

    Args:
      source: a directory or hub name as `transformers` reads them; a bare
        ``tokenizer.json`` (also gzip); or a GPT-2 vocabulary (a JSON object of ids)
        with its merges, the only ``.bpe`` or ``merges.txt`` file beside it.
      eos_token: the end-of-sequence token, for a bare file that does not name one.

    Raises:
      ValueError: if it cannot be read or has no EOS token.
    """
    path = Path(source)
    check_files(path)
    with refusing_failure(f"No tokenizer can be read from {source}"):
        if path.is_file():
            tokenizer = _load_file(path)
        else:
            # Without this, transformers asks at the terminal whether to run code.
            tokenizer = AutoTokenizer.from_pretrained(
                str(source), trust_remote_code=False
            )
    check_templates(tokenizer.chat_template, source)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"The tokenizer {source} has no token {eos_token!r}.")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {source} names no EOS token, so no completion could end; "
            "set eos_token in its tokenizer_config.json, or give --eos-token to init."
        )
    return tokenizer


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """Has the garbage collector look for cycles less often.

    By default it goes through every list of token ids, which is a fifth of our time.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _COLLECTED_TOGETHER) if before[0] else 0)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_collecting_seldom()
def tokenize_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int = 1024,
    too_long: TooLong = "truncate",
    turns: Turns = "all",
    bad: BadRecords | None = None,
    writer: ExampleWriter | None = None,
) -> tuple[FlatExamples, Counts]:
    """Tokenises records, a few at a time.

    An example is too long when its prompt and its longest completion exceed
    `max_length` together. Then either it is dropped; or the prompt keeps its last
    tokens (and BOS), as many as leave room for the longest completion but at least
    half of `max_length`, and each completion keeps its first tokens, in what is left.

    Args:
      records: what to tokenise.
      tokenizer: with an EOS token.
      max_length: most tokens of a prompt and one completion, EOS included.
      too_long: whether to cut or to drop what exceeds it.
      turns: whether every turn of a chat's completion is scored, or the assistant's.
      bad: where records whose chat template fails are noted, which are left out; None:
        the first one stops.
      writer: collects the examples; by default in memory.

    Returns:
      The examples, and the counts of what was cut or left out.

    Raises:
      ValueError: naming the record whose chat template fails; if `max_length` is
        below 4; if `turns` is set and no record is a chat; if no example is left.
    """
    if max_length < 4:
        raise ValueError(f"max_length is {max_length}; it must be at least 4.")
    tally: Counter[str] = Counter()
    writer = ExampleWriter() if writer is None else writer
    ends = _ends(tokenizer)

    def rendered(record: Record) -> tuple[Record, Rendered]:
        tally["chats"] += not isinstance(record.prompt, str)
        return record, render(record, tokenizer, turns)

    for record, ids in _encode(usable(rendered, records, bad), tokenizer, ends):
        tally["records"] += 1
        if ids.length > max_length:
            if too_long == "drop":
                tally["dropped_too_long"] += 1
                continue
            ids = _cut(ids, max_length, ends.bos, tally)
        completions = ids.completions
        if ids.masks is not None and not all(map(any, ids.masks)):
            tally["dropped_unscored"] += 1
        elif len(completions) > 1 and all(c == completions[0] for c in completions):
            tally["dropped_identical"] += 1
        else:
            tally["examples"] += 1
            writer.append(_as_example(ids, record))
    if turns == "assistant" and not tally["chats"]:
        raise ValueError(
            "Only the assistant's turns are to be scored, but no record is a chat; "
            "leave turns at 'all'."
        )
    counts = Counts(*(tally[name] for name in Counts._fields))
    if not counts.examples:
        raise ValueError(
            f"Of {counts.records} records none is left: {counts.dropped_too_long} "
            f"exceed max_length {max_length} and {counts.dropped_identical} have "
            f"identical completions, and of {counts.dropped_unscored} nothing is "
            "scored."
        )
    return writer.finish(), counts


def encode_prompt(prompt: Text, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a prompt to be continued, as in training."""
    ends = _ends(tokenizer)
    if isinstance(prompt, str):
        check_text(prompt, "The prompt")
        return _with_bos(encode(tokenizer, [prompt])[0], ends, ends.adds_bos)
    text = render(Record(prompt, (), "The prompt"), tokenizer).prompt
    return _with_bos(encode(tokenizer, [text])[0], ends, False)


def check_vocabulary(tokenizer: Tokenizer, vocabulary_size: int, model: str) -> None:
    """Refuses a tokenizer whose ids the model's embedding does not have."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, but the embedding of {model} has "
            f"only {vocabulary_size} rows; use the model's own tokenizer."
        )


def _load_file(path: Path) -> Tokenizer:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read(_LARGEST_FILE)
    if len(text) == _LARGEST_FILE:
        raise ValueError(f"it has {_LARGEST_FILE:,} characters or more")
    content = json.loads(text)
    # A vocabulary may hold "model" as well: GPT-2's does, and its value is an id.
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return PreTrainedTokenizerFast(tokenizer_object=RawTokenizer.from_str(text))
    merges = [*path.parent.glob("*.bpe"), *path.parent.glob("*merges.txt")]
    if len(merges) != 1:
        raise ValueError(f"beside the vocabulary {path} there must be one merges file")
    return GPT2Tokenizer(vocab=str(path), merges=str(merges[0]))


class _Ends(NamedTuple):
    """The tokens with which sequences begin and end."""

    bos: int | None
    eos: int | None
    adds_bos: bool  # to a text


class _Ids(NamedTuple):
    """A record as token ids; the masks say which are scored, None that all are."""

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]] | None

    @property
    def length(self) -> int:
        return len(self.prompt) + max(map(len, self.completions))


def _encode(
    rendered: Iterable[tuple[Record, Rendered]], tokenizer: Tokenizer, ends: _Ends
) -> Iterator[tuple[Record, _Ids]]:
    for (record, texts), ids in encode_ahead(tokenizer, rendered, _texts):
        adds_bos = ends.adds_bos and isinstance(record.prompt, str)
        prompt = _with_bos(ids[0], ends, adds_bos)
        piece_ids = iter(ids[1:])
        parts = [list(zip(some, piece_ids, strict=False)) for some in texts.completions]
        completions = [_join(some, _eos(ends)) for some in parts]
        masks = None
        if not all(map(_is_scored, texts.completions)):
            masks = [_mask(some) for some in parts]
        yield record, _Ids(prompt, completions, masks)


def _is_scored(pieces: Sequence[Piece]) -> bool:
    return bool(pieces) and all(piece.is_scored for piece in pieces)


def _texts(item: tuple[Record, Rendered]) -> list[str]:
    """What is tokenised of a record, each apart."""
    _, rendered = item
    pieces = (piece.text for some in rendered.completions for piece in some)
    return [rendered.prompt, *pieces]


def _join(parts: Sequence[tuple[Piece, list[int]]], eos: int) -> list[int]:
    """The pieces of a completion, whose last one ends with EOS."""
    if parts:
        _end_with(parts[-1][1], eos)
    return list(chain.from_iterable(ids for _, ids in parts))


def _mask(parts: Sequence[tuple[Piece, list[int]]]) -> list[bool]:
    return [piece.is_scored for piece, ids in parts for _ in ids]


def _cut(ids: _Ids, max_length: int, bos: int | None, tally: Counter[str]) -> _Ids:
    longest = ids.length - len(ids.prompt)
    prompt = _last(ids.prompt, max(max_length - longest, max_length // 2), bos)
    room = max_length - len(prompt)
    tally["truncated_prompts"] += len(prompt) < len(ids.prompt)
    tally["truncated_completions"] += sum(len(c) > room for c in ids.completions)
    completions = [completion[:room] for completion in ids.completions]
    masks = None if ids.masks is None else [mask[:room] for mask in ids.masks]
    return _Ids(prompt, completions, masks)


def _as_example(ids: _Ids, record: Record) -> Example:
    masks = None
    if ids.masks is not None and not all(map(all, ids.masks)):
        masks = tuple(np.asarray(mask, np.bool_) for mask in ids.masks)
    completions = tuple(np.asarray(some, np.int32) for some in ids.completions)
    prompt = np.asarray(ids.prompt, np.int32)
    return Example(prompt, completions, record.scores, record.weight, masks)


def _with_bos(ids: list[int], ends: _Ends, adds_bos: bool) -> list[int]:
    """BOS once: where the tokenizer adds one, or nothing else could start the row.

    A chat template writes its own BOS or means to have none.
    """
    bos = ends.bos
    if not ids:
        return [_eos(ends) if bos is None else bos]
    return [bos, *ids] if adds_bos and bos is not None and ids[0] != bos else ids


def _ends(tokenizer: Tokenizer) -> _Ends:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert bos is None or isinstance(bos, int)
    assert eos is None or isinstance(eos, int)
    with refusing_failure(MISFIT):
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return _Ends(bos, eos, adds_bos)


def _eos(ends: _Ends) -> int:
    assert ends.eos is not None  # `load_tokenizer` refuses those without
    return ends.eos


def _end_with(ids: list[int], eos: int) -> None:
    while ids and ids[-1] == eos:
        ids.pop()
    ids.append(eos)


def _last(ids: list[int], count: int, bos: int | None) -> list[int]:
    """The last tokens, after BOS where the sequence began with it."""
    if len(ids) <= count:
        return ids
    if ids[0] == bos:
        return [ids[0], *ids[len(ids) - count + 1 :]]
    return ids[len(ids) - count :]
