"""How much a chat template may take: templates are programs, written by strangers.

transformers runs them in jinja's sandbox, which keeps them from files, attributes and
long ranges, but not from loops in loops or texts that fill the memory. Here the time of
one rendering is bounded by a signal, and its memory by the kernel. Where one operation
does not end (on numbers of a million digits), no signal is heard, and the kernel ends
the process. This file knows no tokenizer and no messages.
"""

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from types import FrameType

import jinja2

# Rendering takes a millisecond, and of a conversation of ten megabytes a second. By the
# clock, since threads that tokenise meanwhile take time of all processors.
MOST_SECONDS = 60
_MOST_SECONDS_OF_PROCESSORS = 120 * (os.cpu_count() or 1)
MOST_MEMORY = 4 * 2**30
_STATUS = Path("/proc/self/statm")
_HAS_STATUS = _STATUS.exists()  # only Linux bounds a process's memory


class UnfitTemplate(ValueError):
    """No template to use, whatever the record."""


class _Expired(BaseException):
    """No Exception: a template's own errors are caught while it is compiled."""


@contextmanager
def limits() -> Iterator[None]:
    """Bounds what is done inside; only the main thread hears that the time is up.

    Raises:
      UnfitTemplate: when the time is up, or the memory.
    """
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_CPU)
    before = [resource.getrlimit(kind) for kind in kinds]
    for kind, (soft, hard), most in zip(kinds, before, _most(), strict=True):
        is_less = soft == resource.RLIM_INFINITY or most < soft
        if most != resource.RLIM_INFINITY and is_less:
            resource.setrlimit(kind, (most, hard))
    is_main = threading.current_thread() is threading.main_thread()
    try:
        with _timer() if is_main else nullcontext():
            yield
    except MemoryError as error:
        raise UnfitTemplate(
            "The tokenizer's chat template takes more than "
            f"{MOST_MEMORY >> 30} GiB for one conversation; use another one."
        ) from error
    finally:
        for kind, limit in zip(kinds, before, strict=True):
            resource.setrlimit(kind, limit)


@lru_cache
def check_template(template: str) -> None:
    """Refuses powers: one of them can take for ever, even before anything is rendered.

    Raises:
      UnfitTemplate: naming the line.
    """
    before = ""
    for line, kind, text in jinja2.Environment().lex(template):
        # After these, two asterisks are no power but a call's arguments by name.
        if kind == "operator" and text == "**" and before not in ("(", ","):
            raise UnfitTemplate(
                f"The tokenizer's chat template raises to a power in line {line}, "
                "which no template needs and which can take for ever; use another one."
            )
        before = before if kind == "whitespace" else text


def _most() -> tuple[int, int]:
    """The memory and the seconds that the process may have taken in the end."""
    memory = resource.RLIM_INFINITY
    if _HAS_STATUS:
        with _STATUS.open("rb", buffering=0) as file:
            pages = int(file.read().split()[0])
        memory = pages * resource.getpagesize() + MOST_MEMORY
    return memory, int(time.process_time()) + _MOST_SECONDS_OF_PROCESSORS


@contextmanager
def _timer() -> Iterator[None]:
    def expire(number: int, frame: FrameType | None) -> None:
        raise _Expired

    old = signal.signal(signal.SIGALRM, expire)
    # Again each second, in case something catches everything.
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS, 1)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Expired:
        raise UnfitTemplate(
            f"The tokenizer's chat template takes more than {MOST_SECONDS} seconds for "
            "one conversation, as one that loops for ever does; use another one."
        ) from None
    finally:
        signal.signal(signal.SIGALRM, old)
