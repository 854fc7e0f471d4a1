"""Loss and gradient of each objective against one number, drawn when pages are built.

Completions have ten tokens and a log-probability of -20 nats under the reference.
"""

import io
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from dpojax.losses.make import make_loss
from dpojax.losses.objective import Objective
from dpojax.losses.scores import Scores
from dpojax.losses.table import OBJECTIVES

matplotlib.use("svg")
_LENGTH, _REFERENCE = 10, -20.0
_AXES = {
    "pair": "log-ratio of chosen minus that of rejected, nats",
    "judged": "log-ratio, nats",
    "ranked": "log-ratio of the best minus that of the others, nats",
    "single": "log-probability minus -20, nats",
}


def draw(name: str) -> str:
    """One objective as SVG."""
    import matplotlib.pyplot as plt

    objective = OBJECTIVES[name]
    margins = jnp.linspace(-10.0, 10.0, 201)
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    for label, score in _labels(objective):
        of_margin = partial(loss_at, name, score)
        values = jax.vmap(of_margin)(margins)
        slopes = jax.vmap(jax.grad(of_margin))(margins)
        for axis, numbers in zip(axes, (values, slopes), strict=True):
            axis.plot(np.asarray(margins), np.asarray(numbers), label=label)
    for axis, title in zip(axes, ("loss", "its derivative"), strict=True):
        axis.set(title=title, xlabel=_AXES[objective.kind])
        axis.xaxis.label.set_size(8)
        axis.grid(alpha=0.3)
        if label:
            axis.legend()
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()


def _labels(objective: Objective) -> list[tuple[str, float]]:
    if objective.kind == "judged":
        return [("desirable", 1.0), ("undesirable", 0.0)]
    return [("", 1.0)]


def loss_at(name: str, score: float, margin: jax.Array) -> jax.Array:
    """The loss of a batch of one example."""
    loss = make_loss(name)
    ratios, scores = {
        "pair": (jnp.stack([margin / 2, -margin / 2]), [1.0, 0.0]),
        "judged": (jnp.stack([margin, 0 * margin]), [score, score]),
        "ranked": (jnp.stack([margin, 0 * margin, 0 * margin]), [1.0, 0.5, 0.0]),
        "single": (margin[None], [1.0]),
    }[loss.kind]
    if loss.kind == "judged" and "mismatched" not in loss.needs:
        ratios, scores = ratios[:1], scores[:1]
    one = jnp.ones_like(ratios)
    policy = _REFERENCE + ratios
    if "reward_head" in loss.needs:
        policy = ratios
    candidates = Scores(
        policy=policy[None],
        reference=(_REFERENCE * one)[None],
        length=jnp.full((1, len(scores)), _LENGTH),
        score=jnp.array([scores]),
        policy_prefix=policy[None],
        reference_prefix=(_REFERENCE * one)[None],
        log_sum_squares=policy[None],
        token_kl=jnp.zeros((1, len(scores))),
    )
    outcomes = loss(candidates, loss.initial_running())
    examples, tokens = loss.total(outcomes)
    return examples.sum() + (0.0 if tokens is None else tokens.sum() / _LENGTH)
