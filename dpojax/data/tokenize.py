"""A record to token ids: chat template, beginning and end, truncation, boundaries.

Prompt and completion are tokenised apart, so no merge crosses the boundary and the
policy sees in training exactly the prompt that it is given when it generates. Every
prompt begins with BOS once where the tokenizer has one to add; every completion ends
with EOS once. Rows and batches are not this file's concern.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from tokenizers import Tokenizer as RawTokenizer
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dpojax.data.packing import Example
from dpojax.data.records import Messages, Record

Tokenizer = PreTrainedTokenizerBase
TooLong = Literal["truncate", "drop"]


class Counts(NamedTuple):
    """What became of the records; shown before training."""

    records: int
    examples: int
    truncated_prompts: int
    truncated_completions: int  # these lost their EOS
    dropped_too_long: int
    dropped_identical: int  # all completions of a record are the same tokens


def describe(counts: Counts) -> str:
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
    try:
        if path.is_file():
            tokenizer = _load_file(path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, KeyError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"No tokenizer can be read from {source}: {reason}") from error
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


def tokenize_records(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int = 1024,
    too_long: TooLong = "truncate",
) -> tuple[list[Example], Counts]:
    """Tokenises records.

    An example is too long when its prompt and its longest completion exceed
    `max_length` together. Then either it is dropped; or the prompt keeps its last
    tokens (and BOS), as many as leave room for the longest completion but at least
    half of `max_length`, and each completion keeps its first tokens, in what is left.

    Args:
      records: what to tokenise.
      tokenizer: with an EOS token.
      max_length: most tokens of a prompt and one completion, EOS included.
      too_long: whether to cut or to drop what exceeds it.

    Returns:
      The examples, and the counts of what was cut or left out.

    Raises:
      ValueError: naming the record whose chat template fails; if `max_length` is
        below 4; if no example is left.
    """
    if max_length < 4:
        raise ValueError(f"max_length is {max_length}; it must be at least 4.")
    prompts, completions = _texts(records, tokenizer)
    adds_bos, bos = _adds_bos(tokenizer), _bos(tokenizer)
    prompt_ids = [
        _with_bos(ids, tokenizer, adds_bos and isinstance(record.prompt, str))
        for ids, record in zip(_ids(tokenizer, prompts), records, strict=True)
    ]
    completion_ids = iter(_ids(tokenizer, [t for texts in completions for t in texts]))
    examples: list[Example] = []
    cut_prompts = cut_completions = dropped = identical = 0
    for prompt, texts in zip(prompt_ids, completions, strict=True):
        ended = [_with_eos(next(completion_ids), tokenizer) for _ in texts]
        longest = max(map(len, ended))
        if len(prompt) + longest > max_length:
            if too_long == "drop":
                dropped += 1
                continue
            kept = max(max_length - longest, max_length // 2)
            shorter = _last(prompt, kept, bos)
            room = max_length - len(shorter)
            cut_prompts += len(shorter) < len(prompt)
            cut_completions += sum(len(ids) > room for ids in ended)
            prompt, ended = shorter, [ids[:room] for ids in ended]
        if len(ended) > 1 and all(ids == ended[0] for ids in ended):
            identical += 1
            continue
        arrays = tuple(np.asarray(ids, np.int32) for ids in ended)
        examples.append(Example(np.asarray(prompt, np.int32), arrays))
    counts = Counts(
        len(records), len(examples), cut_prompts, cut_completions, dropped, identical
    )
    if not examples:
        raise ValueError(
            f"Of {len(records)} records none is left: {dropped} exceed max_length "
            f"{max_length} and {identical} have identical completions."
        )
    return examples, counts


def encode_prompt(prompt: str | Messages, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a prompt to be continued, as in training."""
    if isinstance(prompt, str):
        return _with_bos(_ids(tokenizer, [prompt])[0], tokenizer, _adds_bos(tokenizer))
    text = _render(Record(prompt, (), "The prompt"), tokenizer, ())
    return _with_bos(_ids(tokenizer, [text])[0], tokenizer, False)


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
        text = file.read()
    content = json.loads(text)
    # A vocabulary may hold "model" as well: GPT-2's does, and its value is an id.
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return PreTrainedTokenizerFast(tokenizer_object=RawTokenizer.from_str(text))
    merges = [*path.parent.glob("*.bpe"), *path.parent.glob("*merges.txt")]
    if len(merges) != 1:
        raise ValueError(f"beside the vocabulary {path} there must be one merges file")
    return GPT2Tokenizer(vocab=str(path), merges=str(merges[0]))


def _texts(
    records: Sequence[Record], tokenizer: Tokenizer
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Every record's prompt and completions as strings."""
    prompts, completions = [], []
    for record in records:
        if isinstance(record.prompt, str):
            prompts.append(record.prompt)
            completions.append(tuple(str(text) for text in record.completions))
            continue
        prompt = _render(record, tokenizer, ())
        prompts.append(prompt)
        completions.append(
            tuple(
                _rendered_completion(record, tokenizer, prompt, messages)
                for messages in record.completions
            )
        )
    return prompts, completions


def _rendered_completion(
    record: Record, tokenizer: Tokenizer, prompt: str, messages: Sequence[Any]
) -> str:
    whole = _render(record, tokenizer, messages)
    if not whole.startswith(prompt):
        raise ValueError(
            f"{record.origin}: the chat template renders the prompt differently once a "
            "completion follows, so the two cannot be told apart; use another template."
        )
    completion = whole[len(prompt) :]
    # Templates put white space after the end of a turn; nothing is generated there.
    stripped = completion.rstrip()
    return stripped if stripped.endswith(str(tokenizer.eos_token)) else completion


def _render(record: Record, tokenizer: Tokenizer, messages: Sequence[Any]) -> str:
    assert not isinstance(record.prompt, str)
    try:
        rendered = tokenizer.apply_chat_template(
            [*record.prompt, *messages],
            add_generation_prompt=not messages,
            tokenize=False,
        )
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{record.origin}: the tokenizer's chat template fails: {reason}"
        ) from error
    return str(rendered)


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    # verbose=False: a text longer than the model's own limit is dealt with here.
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _with_bos(ids: list[int], tokenizer: Tokenizer, adds_bos: bool) -> list[int]:
    """BOS once: where the tokenizer adds one, or nothing else could start the row.

    A chat template writes its own BOS or means to have none.
    """
    bos = _bos(tokenizer)
    if not ids:
        return [_eos(tokenizer) if bos is None else bos]
    return [bos, *ids] if adds_bos and bos is not None and ids[0] != bos else ids


def _adds_bos(tokenizer: Tokenizer) -> bool:
    bos = _bos(tokenizer)
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _bos(tokenizer: Tokenizer) -> int | None:
    token = tokenizer.bos_token_id
    assert token is None or isinstance(token, int)
    return token


def _eos(tokenizer: Tokenizer) -> int:
    token = tokenizer.eos_token_id
    assert isinstance(token, int)
    return token


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    end, eos = len(ids), _eos(tokenizer)
    while end and ids[end - 1] == eos:
        end -= 1
    return [*ids[:end], eos]


def _last(ids: list[int], count: int, bos: int | None) -> list[int]:
    """The last tokens, after BOS where the sequence began with it."""
    if len(ids) <= count:
        return ids
    if ids[0] == bos:
        return [ids[0], *ids[len(ids) - count + 1 :]]
    return ids[len(ids) - count :]
