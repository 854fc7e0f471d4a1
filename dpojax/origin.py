"""Where in a step the first number that is none came about, in words.

This file reads an examination's findings, and knows neither files nor the loop.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dpojax.examination import STACKED, Findings, Sizes

_NAMED = 3  # parameters that a sentence names, at most


class Origin(NamedTuple):
    """Where it began."""

    place: str  # goes on from "It began in"
    slots: np.ndarray | None  # [rows, slots]: in which examples, where that is known


def find_origin(found: Findings) -> Origin:
    """The first place in the order of the computation that is not finite.

    Within a row, what is no number in one example reaches the others with the next
    layer's attention, whose weights of 0 do not keep it out. So the examples are those
    of the first place alone.

    Args:
      found: on the host.
    """
    stages: tuple[Callable[[Findings], Iterator[Origin]], ...]
    stages = (_in_models, _in_numbers, _in_gradient)
    for stage in stages:
        for origin in stage(found):
            return origin
    if not np.isfinite(found.gradient_norm):
        name, largest = max(_maxima(found.gradient).items(), key=lambda item: item[1])
        return Origin(
            f"the norm of the gradient: its numbers are finite, up to {largest:.3g} in "
            f"{name}, but not their squares",
            None,
        )
    return Origin(
        "what does not happen again: computed once more, everything is finite", None
    )


def stage_names(num_stages: int) -> list[str]:
    """What the stages of a `Trace` are called; layers as in files, from 0."""
    layers = [f"layer {layer}" for layer in range(num_stages - 2)]
    return ["the embedding", *layers, "the last norm"]


def _in_models(found: Findings) -> Iterator[Origin]:
    """In the hidden states of the policy, or of the reference."""
    for who, hidden, weights in (
        ("policy", found.hidden, found.weights),
        ("reference", found.reference_hidden, found.reference_weights),
    ):
        bad = ~np.isfinite(np.zeros((1, 1, 1)) if hidden is None else hidden)
        if not bad.any():
            continue
        stage = int(np.argmax(bad.any((0, 1))))
        name = stage_names(bad.shape[-1])[stage]
        blamed = _names(_of_stage(weights, stage, bad.shape[-1]))
        yield Origin(f"{name} of the {who}{blamed}", bad[..., stage])


def _in_numbers(found: Findings) -> Iterator[Origin]:
    """From log-probabilities to the loss's derivative by them."""
    output = {
        name: size
        for name, size in found.weights.items()
        if not name.startswith(STACKED)
    }
    for place, sizes in (
        ("the policy's log-probabilities" + _names(_bad(output)), found.log_probs),
        ("the reference's log-probabilities", found.reference_log_probs),
        ("the loss, of log-probabilities that are finite", found.losses),
        ("the derivative of a loss that is finite", found.slopes),
    ):
        bad = ~np.isfinite(np.zeros((1, 1)) if sizes is None else sizes)
        if bad.any():
            yield Origin(place, bad)


def _in_gradient(found: Findings) -> Iterator[Origin]:
    """In a layer's backward pass, which goes from the last to the first."""
    bad = _bad(found.gradient)
    stacked = {name: layers for name, layers in bad.items() if name.startswith(STACKED)}
    others = [name for name in bad if name not in stacked]
    after = [name for name in others if not name.startswith(("embedding", "position"))]
    if after:
        yield Origin(f"the gradient after the last layer{_names(after)}", None)
    if stacked:
        layer = max(int(np.flatnonzero(layers).max()) for layers in stacked.values())
        names = [name for name, layers in stacked.items() if layers[layer]]
        yield Origin(f"the gradient of layer {layer}{_names(names)}", None)
    if others:
        yield Origin(f"the gradient before the first layer{_names(others)}", None)


def _of_stage(weights: Sizes, stage: int, num_stages: int) -> list[str]:
    """The parameters of a stage that are not finite themselves."""
    bad, layer = _bad(weights), stage - 1
    if 0 < stage < num_stages - 1:
        return [
            name
            for name, layers in bad.items()
            if name.startswith(STACKED) and layers[layer]
        ]
    beginning = "norm" if stage else ("embedding", "position")
    return [name for name in bad if name.startswith(beginning)]


def _bad(sizes: Sizes) -> dict[str, Any]:
    """Which layers of parameters are not finite, where any is."""
    found = {name: ~np.isfinite(size) for name, size in sizes.items()}
    return {name: bad for name, bad in found.items() if bad.any()}


def _maxima(sizes: Sizes) -> dict[str, float]:
    return {name: float(np.max(size)) for name, size in sizes.items()}


def _names(names: Iterable[str]) -> str:
    """A clause that names parameters; none of none."""
    names = sorted(names)
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f", not finite in {', '.join(names[:_NAMED])}{more}"
