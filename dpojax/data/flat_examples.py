"""Examples as a few flat arrays, in memory or in files that are mapped into it.

A list of a million examples takes gigabytes for objects alone. Here an example is made
when it is asked for, of views of one array of tokens; how many positions each takes,
and what all of them together are, is known without looking at the tokens. This file
knows no text, and not when files are kept.
"""

import hashlib
import io
import operator
import struct
from array import array
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np

from dpojax.data.packing import Example, MeasuredExamples
from dpojax.data.plan import Lengths

# Each array and its dtype. Of every example: its parts are its prompt and completions.
DTYPES = {
    "tokens": "int32",  # of all parts, one after another
    "ends": "int64",  # of each part, among the tokens
    "parts": "int64",  # where each example's parts end, among all parts
    "weights": "float64",  # of each example
    "scores": "float64",  # of completions that have any
    "scores_at": "int64",  # of each example, where its scores begin; -1: it has none
    "masks": "int8",  # of tokens of completions that are not all scored
    "masks_at": "int64",  # of each example, where its masks begin; -1: it has none
}
_TOGETHER = 2**16  # numbers
_as_bytes = struct.Struct("=q").pack


class FlatExamples(MeasuredExamples):
    """Examples of which only those exist that are asked for."""

    def __init__(self, arrays: Mapping[str, np.ndarray], fingerprint: str):
        """Takes arrays as `ExampleWriter` makes them, and the hash that it makes."""
        self._tokens, self._ends = arrays["tokens"], arrays["ends"]
        self._parts, self._weights = arrays["parts"], arrays["weights"]
        self._scores, self._scores_at = arrays["scores"], arrays["scores_at"]
        self._masks, self._masks_at = arrays["masks"], arrays["masks_at"]
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._example(place) for place in range(len(self))[index]]
        return self._example(range(len(self))[operator.index(index)])

    def row_lengths(self) -> Lengths:
        """Positions that each example takes: all its tokens but one."""
        ends = self._ends[self._parts - 1]
        return np.diff(ends, prepend=0) - 1

    def most_completions(self) -> int:
        """The most completions that an example has."""
        return int(np.diff(self._parts, prepend=0).max()) - 1

    def _example(self, place: int) -> Example:
        first = int(self._parts[place - 1]) if place else 0
        last = int(self._parts[place])
        start = int(self._ends[first - 1]) if first else 0
        bounds = [start, *self._ends[first:last].tolist()]
        prompt, *completions = [self._tokens[a:b] for a, b in pairwise(bounds)]
        scores = masks = None
        at = int(self._scores_at[place])
        if at >= 0:
            scores = tuple(self._scores[at : at + len(completions)].tolist())
        at = int(self._masks_at[place])
        if at >= 0:
            shift = at - bounds[1]
            masks = tuple(
                self._masks[a + shift : b + shift].view(np.bool_)
                for a, b in pairwise(bounds[1:])
            )
        weight = float(self._weights[place])
        return Example(prompt, tuple(completions), scores, weight, masks)


class ExampleWriter:
    """Collects examples, in memory or in the files of a directory."""

    def __init__(self, directory: Path | None = None):
        """Begins with none."""
        self._columns = {
            name: _Column(dtype, None if directory is None else directory / name)
            for name, dtype in DTYPES.items()
        }
        self._fingerprint = Fingerprint()

    def append(self, example: Example) -> None:
        """Adds an example, of whose reference nothing is known yet."""
        self._fingerprint.add(example)
        columns = self._columns
        tokens, ends = columns["tokens"], columns["ends"]
        end = tokens.count
        for part in (example.prompt, *example.completions):
            tokens.extend(part)
            end += len(part)
            ends.append(end)
        columns["parts"].append(ends.count)
        columns["weights"].append(example.weight)
        scores_at = masks_at = -1
        if example.scores is not None:
            scores_at = columns["scores"].count
            columns["scores"].extend(np.array(example.scores))
        if example.masks is not None:
            masks_at = columns["masks"].count
            columns["masks"].extend(np.concatenate(example.masks))
        columns["scores_at"].append(scores_at)
        columns["masks_at"].append(masks_at)
        if tokens.num_last >= _TOGETHER:
            for column in columns.values():
                column.keep()

    def finish(self) -> FlatExamples:
        """The examples; what was written is in its files."""
        arrays = {name: column.finish() for name, column in self._columns.items()}
        return FlatExamples(arrays, self._fingerprint.hexdigest())


class Fingerprint:
    """A hash of every token id and boundary, and of what was said of each example."""

    def __init__(self):
        self._digest = hashlib.sha256()

    def add(self, example: Example) -> None:
        """Continues with an example."""
        parts = [_as_bytes(len(example.completions))]
        for tokens in (example.prompt, *example.completions):
            parts += [_as_bytes(len(tokens)), tokens.tobytes()]
        parts.append(repr((example.scores, example.weight)).encode())
        parts += [mask.tobytes() for mask in example.masks or ()]
        self._digest.update(b"".join(parts))

    def hexdigest(self) -> str:
        """The hash of the examples so far."""
        return self._digest.hexdigest()


def map_examples(directory: Path, fingerprint: str) -> FlatExamples:
    """The examples in whole files, of which what is used is read."""
    arrays = {name: _map(directory / name, dtype) for name, dtype in DTYPES.items()}
    return FlatExamples(arrays, fingerprint)


def _map(path: Path, dtype: str) -> np.ndarray:
    if not path.stat().st_size:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r"))


class _Column:
    """The numbers of one array; the last ones are put together before they are kept."""

    def __init__(self, dtype: str, path: Path | None):
        self._dtype, self._path = np.dtype(dtype), path
        self._last = array(self._dtype.char)
        self._num_kept = 0
        self._memory = io.BytesIO()  # without a file
        self.append = self._last.append
        if path is not None:
            path.write_bytes(b"")

    @property
    def num_last(self) -> int:
        """How many numbers are not kept yet."""
        return len(self._last)

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return self._num_kept + len(self._last)

    def extend(self, numbers: np.ndarray) -> None:
        self._last.frombytes(numbers.astype(self._dtype, copy=False).tobytes())

    def keep(self) -> None:
        if self._path is None:
            self._memory.write(self._last)
        else:
            with self._path.open("ab") as file:
                file.write(self._last)
        self._num_kept += len(self._last)
        del self._last[:]

    def finish(self) -> np.ndarray:
        self.keep()
        if self._path is None:
            return np.frombuffer(self._memory.getbuffer(), self._dtype)
        return _map(self._path, self._dtype.str)
