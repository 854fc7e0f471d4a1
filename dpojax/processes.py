"""What the processes of a run tell each other, and what one of them does for all.

Every process runs the same program and must call these functions in the same order.
One process alone computes nothing and waits for nobody. This file knows no settings;
how processes find each other is `dpojax.connecting`'s concern.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec

import jax
import numpy as np
from jax.experimental import multihost_utils

Arguments = ParamSpec("Arguments")


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def only_first(function: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """The same function in process 0; in the others, one that does nothing."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if is_first():
            function(*args, **kwargs)

    return call


def wait_for_all(name: str) -> None:
    """Returns when every process is here; `name` is shown where one is elsewhere."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(array: np.ndarray) -> np.ndarray:
    """What process 0 has, in every process; all give arrays of one shape."""
    if jax.process_count() == 1:
        return array
    return np.array(multihost_utils.broadcast_one_to_all(array))


def decided_by_first(decide: Callable[[], str]) -> str:
    """A text that process 0 alone decides on, since the others might decide otherwise.

    Raises:
      ValueError: in every process, if it is raised in process 0.
    """
    if jax.process_count() == 1:
        return decide()
    answer, refusal = "", ""
    if is_first():
        try:
            answer = decide()
        except ValueError as error:
            refusal = str(error)
    answer, refusal = (_text_from_first(text) for text in (answer, refusal))
    if refusal:
        raise ValueError(refusal)
    return answer


def check_same(values: Mapping[str, object], remedy: str) -> None:
    """Refuses to go on where processes differ, which would spoil the result silently.

    Args:
      values: by the names that a message gives them; the same names everywhere.
      remedy: what to do where they differ.

    Raises:
      ValueError: in every process, naming the first value that differs, and where.
    """
    if jax.process_count() == 1:
        return
    hashes = [
        hashlib.sha256(repr(value).encode()).digest() for value in values.values()
    ]
    own = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1)
    differs = (
        np.asarray(multihost_utils.process_allgather(own)) != from_first(own)
    ).any(-1)
    for name, of_processes in zip(values, differs.T, strict=True):
        if of_processes.any():
            numbers = ", ".join(map(str, np.flatnonzero(of_processes)))
            raise ValueError(
                f"The {name} of process {numbers} is another than that of process 0; "
                f"{remedy}."
            )


def gathered(array: jax.Array | np.ndarray) -> np.ndarray:
    """All values of an array; every process must ask for them."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _text_from_first(text: str) -> str:
    encoded = np.frombuffer(text.encode(), np.uint8)
    size = int(from_first(np.int64(len(encoded)).reshape(1))[0])
    if not size:
        return ""
    return from_first(np.resize(encoded, size)).tobytes().decode()
