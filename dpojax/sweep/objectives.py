"""Several losses as one, chosen by a number: a loss sees only numbers of a batch.

What chooses may be traced, so that mapped over runs each has its own loss while they
share the model's passes. Every branch is computed for every run then, which costs next
to nothing beside a model. A run gets the metrics that it would have alone; where others
have more, its own are filled with zeros. This file knows no model and no optimiser.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dpojax.batch import Batch
from dpojax.gradient import Denominators, Judge, Running, judge
from dpojax.losses.make import Loss
from dpojax.losses.objective import Need
from dpojax.losses.scores import Scores
from dpojax.measure import Measured
from dpojax.metrics import Sums
from dpojax.train_step import assess

Index = int | Int[Array, ""]
# Scores that are measured only for losses with all of these needs.
_ASKED: dict[str, frozenset[Need]] = {
    "reference": frozenset({"reference"}),
    "reference_prefix": frozenset({"reference", "prefix"}),
    "policy_prefix": frozenset({"prefix"}),
    "log_sum_squares": frozenset({"log_sum_squares"}),
    "token_kl": frozenset({"token_kl"}),
}


class Names(NamedTuple):
    """What a loss alone measures."""

    sums: frozenset[str]
    figures: frozenset[str]


class Objectives:
    """Losses of one kind of example."""

    def __init__(self, losses: Sequence[Loss]):
        """Takes the losses in the order of their numbers."""
        self._losses = tuple(losses)
        self.needs = frozenset[Need]().union(*(loss.needs for loss in losses))
        self._batchwise = any(loss.batchwise for loss in losses)

    def judge(self, index: Index) -> Judge:
        """The loss of this number, as a step sees it."""
        return Judge(
            self.needs,
            self._batchwise,
            partial(self._judge, index),
            partial(self._update_running, index),
        )

    def assess(
        self, index: Index, measured: Measured, batch: Batch, running: Running
    ) -> tuple[Sums, Sums]:
        """What an evaluation step of the loss of this number says."""
        return _switch(
            index,
            [partial(_assess_alone, loss) for loss in self._losses],
            (measured, batch, running),
        )

    def names(self, index: int, measured: Measured, batch: Batch) -> Names:
        """What the loss of this number measures.

        Args:
          index: its number.
          measured: shapes of what all losses need.
          batch: likewise.
        """
        loss = self._losses[index]
        running = loss.initial_running()
        found = jax.eval_shape(partial(_assess_alone, loss), measured, batch, running)
        return Names(*map(frozenset, found))

    def _judge(
        self,
        index: Index,
        measured: Measured,
        batch: Batch,
        running: Running,
        by: Denominators,
    ) -> tuple[Array, Sums]:
        value, sums = _switch(
            index,
            [partial(_judge_alone, loss) for loss in self._losses],
            (measured, batch, running, by),
        )
        return value["loss"], sums

    def _update_running(
        self, index: Index, running: Running, scores: Scores
    ) -> Running:
        if not running:
            return running

        def updated(loss: Loss, running: Running, scores: Scores) -> tuple[Running]:
            return (running | loss.update_running(running, _alone(loss, scores)),)

        functions = [partial(updated, loss) for loss in self._losses]
        return _switch(index, functions, (running, scores))[0]


def _judge_alone(
    loss: Loss, measured: Measured, batch: Batch, running: Running, by: Denominators
) -> tuple[dict[str, Array], Sums]:
    seen = measured._replace(scores=_alone(loss, measured.scores))
    value, sums = judge(loss, seen, batch, running, by)
    return {"loss": value}, sums


def _assess_alone(
    loss: Loss, measured: Measured, batch: Batch, running: Running
) -> tuple[Sums, Sums]:
    seen = measured._replace(scores=_alone(loss, measured.scores))
    return assess(loss, seen, batch, running)


def _alone(loss: Loss, scores: Scores) -> Scores:
    """What would have been measured for this loss alone."""
    others = [name for name, needs in _ASKED.items() if not needs <= loss.needs]
    return scores._replace(**dict.fromkeys(others))


def _switch(
    index: Index, functions: Sequence[Callable[..., Any]], operands: tuple
) -> Any:
    """What one of several functions gives: dicts, with zeros for others' entries."""
    shapes = [jax.eval_shape(function, *operands) for function in functions]
    every = [
        {name: shape for part in parts for name, shape in part.items()}
        for parts in zip(*shapes, strict=True)
    ]

    def filled(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any) -> tuple[dict[str, Any], ...]:
            found = function(*operands)
            return tuple(
                {name: part.get(name, _zeros(whole[name])) for name in whole}
                for part, whole in zip(found, every, strict=True)
            )

        return call

    return jax.lax.switch(index, [filled(one) for one in functions], *operands)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
