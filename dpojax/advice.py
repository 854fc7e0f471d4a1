"""Warnings that teach: what lines of metrics say of a run, with the usual remedy.

Each kind comes once a run, at the first line that shows it. The same lines give the
same warnings, so a resumed run has those of one that was never stopped. This file knows
no files and no model.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

Line = Mapping[str, float | None]  # a line of metrics, without its step and split

# Examples in succession that were all right: where one in twenty is wrong, so many come
# with a probability of 0.2 per cent.
ENOUGH_RIGHT = 128
# Nats: a pair of this margin has a gradient of exp(-20), two in a billion.
LARGEST_MARGIN = 20.0
# Nats that the mean preferred completion has lost: it is then e times less likely.
MOST_LOST = 1.0
# Standard errors: by chance once in 700 evaluations.
CERTAIN = 3.0
# Of the lengths of samples, either way: what DPO does to them is the subject of Park et
# al. 2024 (arXiv:2403.19159). The bound is ours.
LENGTH_FACTOR = 1.5
# Mean weight of gradients, 1/2 at the start; 99 of a hundred parts are then gone.
SMALLEST_WEIGHT = 0.005
# Nats a sequence. Rafailov et al. 2024 (arXiv:2406.02900) see quality fall with it
# while the implicit reward grows. The bound is ours.
LARGEST_KL = 50.0


class Advice(NamedTuple):
    """A warning."""

    step: int
    kind: str
    text: str


class Adviser:
    """Reads lines in their order; each kind of warning is given once."""

    def __init__(self, *, batch_size: int, is_logistic: bool):
        """Takes what the lines do not say.

        Args:
          batch_size: examples of a step.
          is_logistic: whether the loss of a pair is minus the log-sigmoid of something;
            then exp(-loss) is that sigmoid, and one minus it the gradient's weight.
        """
        self._batch_size = batch_size
        self._is_logistic = is_logistic
        self._given: set[str] = set()
        self._trained_until = 0  # step of the newest line of training
        self._num_right = 0  # examples in succession
        self._has_trained = False  # since the last evaluation, at a rate above 0
        self._first_test: Line = {}
        self._last_test: Line = {}
        self._last_tested_at = 0
        self._rules: dict[str, tuple[_Rule, ...]] = {
            "train": (self._all_right, self._exploding, self._saturated),
            "test": (self._unmoved, self._displaced, self._drifting, self._far),
        }

    def read(self, step: int, split: str, line: Line) -> list[Advice]:
        """What this line is the first to show."""
        if split == "train":
            self._count_right(step, line)
            self._has_trained |= _value(line, "learning_rate") > 0
        elif not self._first_test:
            self._first_test = line
        found = []
        for rule in self._rules[split]:
            kind = rule.__name__.strip("_")
            text = None if kind in self._given else rule(line)
            if text is not None:
                self._given.add(kind)
                found.append(Advice(step, kind, text))
        if split == "test":
            self._last_test, self._last_tested_at = line, step
            self._has_trained = False
        return found

    def _count_right(self, step: int, line: Line) -> None:
        seen = (step - self._trained_until) * self._batch_size
        is_right = line.get("rewards/accuracies") == 1.0
        self._num_right = self._num_right + seen if is_right else 0
        self._trained_until = step

    def _all_right(self, line: Line) -> str | None:
        epoch = _value(line, "epoch")
        if self._num_right < ENOUGH_RIGHT or not epoch <= 1:
            return None
        return (
            f"The last {self._num_right} training examples were all ranked right, at "
            f"epoch {epoch:.2f}: the preferences can be told by something simple, such "
            "as length or form, or are in the data twice. Compare accuracy on held-out "
            "examples and on pairs of equal length; stop early, or take harder pairs."
        )

    def _exploding(self, line: Line) -> str | None:
        margin = _value(line, "rewards/margins")
        if not margin > LARGEST_MARGIN:
            return None
        return (
            f"The mean margin of rewards is {margin:.3g}, above {LARGEST_MARGIN:g}: "
            "the policy goes on separating pairs that it has long ranked right. Lower "
            "the learning rate, raise beta, train for less, or take a loss whose "
            "margin is bounded, such as ipo."
        )

    def _saturated(self, line: Line) -> str | None:
        if not self._is_logistic:
            return None
        most = -math.expm1(-_value(line, "loss"))  # of the mean weight: by concavity
        if not most < SMALLEST_WEIGHT:
            return None
        return (
            f"The loss is saturated: gradients have at most {most:.2g} of their weight "
            "(one half at the start), so further steps teach almost nothing. Stop "
            "here, smooth the labels (--loss.label-smoothing 0.1), or take ipo."
        )

    def _unmoved(self, line: Line) -> str | None:
        if not self._last_test or not self._has_trained:
            return None
        names = [n for n in line if n == "loss" or n.startswith(("logps/", "rewards/"))]
        if any(line[name] != self._last_test.get(name) for name in names):
            return None
        steps = f"{self._last_tested_at} and {self._trained_until}"
        return (
            f"Steps between {steps} moved nothing: the evaluations agree to the last "
            "digit. The learning rate is too small for the dtype of the weights (a "
            "bfloat16 weight of 0.02 moves by no less than 6e-5), or what is trained "
            "has no effect. Raise the learning rate, or compute in float32."
        )

    def _displaced(self, line: Line) -> str | None:
        lost = -_value(line, "logratios/chosen")
        error = _value(line, "logratios/chosen_se")
        if not (lost > MOST_LOST and lost > CERTAIN * error):
            return None
        return (
            f"Preferred completions of held-out examples lost {lost:.3g} nats in the "
            "mean (likelihood displacement): probability goes to completions that are "
            "in no pair. Lower the learning rate, raise beta, or hold the preferred "
            "ones up: dpop, or a sum such as dpo+0.2*sft."
        )

    def _drifting(self, line: Line) -> str | None:
        name = "samples/length"
        before, now = _value(self._first_test, name), _value(line, name)
        errors = _value(self._first_test, f"{name}_se"), _value(line, f"{name}_se")
        factor = max(now, before) / min(now, before)
        certain = abs(now - before) > CERTAIN * math.hypot(*errors)
        if not (factor > LENGTH_FACTOR and certain):
            return None
        return (
            f"Samples have {now:.3g} tokens in the mean, and had {before:.3g} before "
            "training. Where preferred completions are the longer ones, summed "
            "log-probabilities reward length: look at rewards/length_correlation, and "
            "take ld_dpo, r_dpo, dpo_norm or simpo."
        )

    def _far(self, line: Line) -> str | None:
        kl, error = _value(line, "samples/kl"), _value(line, "samples/kl_se")
        if not kl - CERTAIN * error > LARGEST_KL:
            return None
        return (
            f"Samples are {kl:.3g} nats from the reference, beyond {LARGEST_KL:g}: so "
            "far out the implicit reward says little of what people prefer "
            "(over-optimisation). Raise beta, train for less, or take an earlier "
            "checkpoint by dpojax export --step."
        )


_Rule = Callable[[Line], str | None]


def advise(
    lines: Iterable[tuple[int, str, Line]], *, batch_size: int, is_logistic: bool
) -> list[Advice]:
    """What a history of (step, split, line) shows; see `Adviser`."""
    adviser = Adviser(batch_size=batch_size, is_logistic=is_logistic)
    return [advice for line in lines for advice in adviser.read(*line)]


def _value(line: Line, name: str) -> float:
    """A figure, or NaN, with which nothing compares."""
    value = line.get(name)
    return math.nan if value is None else value
