"""Log-probabilities under a frozen reference, computed once for a set of examples.

The same function as in the train step, without gradients, in rows that are filled for
the whole set at once; so the numbers equal those of the step but for rounding. What a
cache holds is not computed, and what is computed is there at once for the next run, or
for this one if it is cut off. This file knows no settings and no loop.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dpojax.batch import Batch
from dpojax.data.packing import (
    MAX_SLOTS,
    Example,
    as_batch,
    choose_row_length,
    most_completions,
    row_length,
)
from dpojax.measure import Apply, Params, make_measure
from dpojax.progress import say, track
from dpojax.reference_cache import (
    Cache,
    hash_example,
    read_cache,
    write_chunk,
)
from dpojax.sharding import Placement
from dpojax.spread import Spread

ReferenceStep = Callable[[Params, Batch], Float[Array, "rows slots completions 2"]]


def make_reference_step(
    apply: Apply, mesh: Mesh, *, chunk_size: int = 512
) -> ReferenceStep:
    """Builds ``step(reference, batch)``, jitted; every process gets the whole result.

    Args:
      apply: the model: parameters and batch to hidden states and output matrix.
      mesh: over which the rows are divided.
      chunk_size: positions of each shard whose logits exist at one time.

    Returns:
      A function whose result is, for each completion in its slot, its log-probability
      in nats and that of its shared prefix.
    """
    measure = make_measure(
        apply,
        frozenset({"prefix"}),
        chunk_size=chunk_size,
        spread=Spread(mesh),
    )

    def step(params: Params, batch: Batch) -> Array:
        scores = measure(params, None, batch).scores
        assert scores.policy_prefix is not None
        return jnp.stack([scores.policy, scores.policy_prefix], axis=-1)

    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))


def with_reference(
    examples: Sequence[Example],
    step: ReferenceStep,
    load: Callable[[], Params],
    cache: Cache,
    *,
    num_rows: int,
    placement: Placement,
    per_file: int = 1024,
) -> list[Example]:
    """The examples with the reference's log-probabilities, of the cache or computed.

    Process 0 alone reads and writes the cache, so that all agree on what is missing.

    Args:
      examples: what to measure; equal ones are measured once.
      step: of `make_reference_step`.
      load: gives the reference's parameters; called where something is missing.
      cache: where the numbers are kept.
      num_rows: most rows computed at one time, rounded up to fill the devices.
      placement: how rows reach the devices.
      per_file: examples after which a file is written: what is lost if cut off.

    Raises:
      ValueError: if the reference gives a number that is not finite.
    """
    keys = [hash_example(example) for example in examples]
    distinct = dict(zip(keys, examples, strict=True))
    numbers = from_first(_look_up(distinct, cache))
    missing = np.flatnonzero(np.isnan(numbers[:, 0, 0]))
    say(
        f"Log-probabilities under the reference: {len(distinct) - len(missing):,} "
        f"examples reused, {len(missing):,} to compute; they are in {cache.directory}."
    )
    if len(missing):
        ids, wanted = list(distinct), [*distinct.values()]
        parts = compute_numbers(
            [wanted[place] for place in missing],
            step,
            load(),
            num_rows=num_rows,
            placement=placement,
        )
        for places, found in _in_files(parts, per_file):
            numbers[missing[places], : found.shape[1]] = found
            if jax.process_index() == 0:
                write_chunk(cache, [ids[missing[place]] for place in places], found)
    found = dict(zip(distinct, numbers, strict=True))
    return [
        _bring_along(example, found[key])
        for key, example in zip(keys, examples, strict=True)
    ]


def compute_numbers(
    examples: Sequence[Example],
    step: ReferenceStep,
    params: Params,
    *,
    num_rows: int,
    placement: Placement,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Places of examples, and their numbers ``[examples, completions, 2]``, in parts.

    Takes what `with_reference` takes; the longest examples come first.
    """
    length, most = choose_row_length(examples), most_completions(examples)
    rows = fill_rows([row_length(example) for example in examples], length)
    shards = placement.num_shards
    count = -(-min(num_rows, len(rows)) // shards) * shards
    with track("Reference", total=-(-len(rows) // count)) as advance:
        for start in range(0, len(rows), count):
            some = rows[start : start + count]
            filled = [[examples[place] for place in row] for row in some]
            filled += [[] for _ in range(count - len(some))]
            batch = as_batch(
                filled, length=length, num_slots=MAX_SLOTS, num_completions=most
            )
            found = jax.device_get(step(params, placement.put(batch)))
            if not np.isfinite(found).all():
                raise ValueError(
                    "The reference gives log-probabilities that are not finite; look "
                    "for damage in its weights."
                )
            of_slots = [found[row, : len(some[row])] for row in range(len(some))]
            yield [place for row in some for place in row], np.concatenate(of_slots)
            advance("")


def fill_rows(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Places of examples by rows: the longest that is left, then the shortest that fit.

    Args:
      lengths: positions that each example takes.
      length: positions of a row; no example takes more.
    """
    left = deque(sorted(range(len(lengths)), key=lambda place: -lengths[place]))
    rows = []
    while left:
        row = [left.popleft()]
        room = length - lengths[row[0]]
        while left and lengths[left[-1]] <= room and len(row) < MAX_SLOTS:
            room -= lengths[left[-1]]
            row.append(left.pop())
        rows.append(row)
    return rows


def from_first(array: np.ndarray) -> np.ndarray:
    """What process 0 has, in every process."""
    if jax.process_count() == 1:
        return array
    return np.array(multihost_utils.broadcast_one_to_all(array))


def _look_up(distinct: dict[bytes, Example], cache: Cache) -> np.ndarray:
    """Numbers by example, completion and kind; not a number where there are none."""
    shape = (len(distinct), most_completions([*distinct.values()]), 2)
    numbers = np.full(shape, np.nan, np.float32)
    if jax.process_index() == 0:
        known = read_cache(cache)
        for place, (key, example) in enumerate(distinct.items()):
            if key in known:
                count = len(example.completions)
                numbers[place, :count] = known[key][:count]
    return numbers


def _in_files(
    parts: Iterator[tuple[list[int], np.ndarray]], per_file: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Parts joined until they hold so many examples."""
    places: list[int] = []
    arrays: list[np.ndarray] = []
    for some, numbers in parts:
        places += some
        arrays.append(numbers)
        if len(places) >= per_file:
            yield places, np.concatenate(arrays)
            places, arrays = [], []
    if places:
        yield places, np.concatenate(arrays)


def _bring_along(example: Example, numbers: np.ndarray) -> Example:
    whole, prefix = numbers[: len(example.completions)].T.tolist()
    return example._replace(reference=tuple(whole), reference_prefix=tuple(prefix))
