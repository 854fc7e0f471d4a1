"""Log-probabilities under a frozen reference, computed once for a set of examples.

The same function as in the train step, without gradients, in rows that are filled for
the whole set at once; so the numbers equal those of the step but for rounding. What a
cache holds is not computed, and what is computed is there at once for the next run, or
for this one if it is cut off. This file knows no settings and no loop.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dpojax.batch import Batch
from dpojax.data.loader import packed_batches
from dpojax.data.packing import Example, most_completions
from dpojax.measure import Apply, Params, make_measure
from dpojax.processes import from_first, is_first
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
    batch_size: int,
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
      batch_size: examples computed at one time, about.
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
            batch_size=batch_size,
            placement=placement,
        )
        for places, found in _in_files(parts, per_file):
            numbers[missing[places], : found.shape[1]] = found
            if is_first():
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
    batch_size: int,
    placement: Placement,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Places of examples, and their numbers ``[examples, completions, 2]``, in parts.

    Takes what `with_reference` takes.
    """
    batches = packed_batches(examples, batch_size, placement.num_shards)
    with track("Reference", total=-(-len(examples) // batch_size)) as advance:
        for rows, batch in batches:
            found = jax.device_get(step(params, placement.put(batch)))
            if not np.isfinite(found).all():
                raise ValueError(
                    "The reference gives log-probabilities that are not finite; look "
                    "for damage in its weights."
                )
            of_slots = [found[row, : len(places)] for row, places in enumerate(rows)]
            places = [int(place) for row in rows for place in row]
            yield places, np.concatenate(of_slots)
            advance("")


def _look_up(distinct: dict[bytes, Example], cache: Cache) -> np.ndarray:
    """Numbers by example, completion and kind; not a number where there are none."""
    shape = (len(distinct), most_completions([*distinct.values()]), 2)
    numbers = np.full(shape, np.nan, np.float32)
    if is_first():
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
