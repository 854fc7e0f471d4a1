"""Notices that a run is to end soon: SIGTERM, which preempted machines get.

This file does not know what a run does about it.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Gives a function of a step: whether some process was told to end.

    It is to be asked at every step, by every process: only so do all of them agree on
    the one that is their last. A signal that came before does no longer end a process
    at once, so whoever asks must stop.
    """
    if jax.process_count() > 1:  # JAX's own service listens to the signal
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python lets only the main thread hear signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
