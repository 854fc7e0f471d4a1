"""Texts to token ids, many at a time, on all cores.

Nothing is added to what a text says; where one begins and ends, and what it is a part
of, is `dpojax.data.tokenize`'s concern.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from dpojax.data.bad_records import cut
from dpojax.data.chats import Tokenizer

T = TypeVar("T")
Ids = list[list[int]]  # of each text

MISFIT = "The tokenizer fails, so its files do not fit each other"
_WINDOW = 1_024  # items that are taken together: enough for all cores, few in memory


def encode(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    """The token ids of texts, however long these are."""
    if not texts:
        return []
    with refusing_failure(MISFIT):
        return _encode(tokenizer, texts)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        # verbose=False: a text longer than the model's own limit is dealt with later.
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # The library behind it, called as it calls it, but without the offsets of tokens,
    # which take a third of the time.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


@contextmanager
def refusing_failure(what: str) -> Iterator[None]:
    """Says what it is, whichever way two libraries fail on files of strangers.

    The tokenizers library raises bare Exceptions, and others where its Rust panics;
    transformers whatever a value of a wrong kind leads to.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not is_panic and not isinstance(error, Exception):
            raise
        reason = " ".join(cut(str(error)).split())
        raise ValueError(f"{what}: {reason}") from error


def encode_ahead(
    tokenizer: Tokenizer, items: Iterable[T], texts_of: Callable[[T], list[str]]
) -> Iterator[tuple[T, Ids]]:
    """Items, each with the ids of its texts; some windows of items are ahead.

    While a thread tokenises, outside of Python, another one makes the next items and
    uses the last ones.
    """
    remaining = iter(items)
    pending: deque[tuple[list[T], list[int], Future[Ids]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as thread:
        while True:
            window = list(islice(remaining, _WINDOW))
            if window:
                texts = [texts_of(item) for item in window]
                flat = [text for some in texts for text in some]
                future = thread.submit(encode, tokenizer, flat)
                pending.append((window, [len(some) for some in texts], future))
            if not pending:
                return
            if len(pending) > 1 or not window:
                window, counts, future = pending.popleft()
                ids = iter(future.result())
                for item, count in zip(window, counts, strict=True):
                    yield item, list(islice(ids, count))
