"""Warnings of hand-made lines: each at the line that first shows it, and once."""

import math

import pytest

from dpojax.advice import Adviser, advise
from dpojax.metrics_file import MetricsFile
from dpojax.recording import Recording
from dpojax.trackers import Trackers

LINES = {
    "all_right": ("train", {"rewards/accuracies": 1.0, "epoch": 0.5}, "128 training"),
    "exploding": ("train", {"rewards/margins": 21.0}, "is 21, above 20"),
    # 1 - exp(-0.002): just below 0.002
    "saturated": ("train", {"loss": 0.002}, "at most 0.002 of"),
    "displaced": (
        "test",
        {"logratios/chosen": -2.5, "logratios/chosen_se": 0.5},
        "lost 2.5 nats",
    ),
    "far": ("test", {"samples/kl": 61.0, "samples/kl_se": 3.0}, "61 nats"),
}
NEAR = {
    "all_right": {"rewards/accuracies": 0.99, "epoch": 0.5},
    "exploding": {"rewards/margins": 20.0},
    "saturated": {"loss": 0.0051},
    "displaced": {"logratios/chosen": -2.5, "logratios/chosen_se": 0.9},
    "far": {"samples/kl": 61.0, "samples/kl_se": 4.0},
}


def kinds(*lines, is_logistic: bool = True) -> list[tuple[int, str]]:
    found = advise(lines, batch_size=64, is_logistic=is_logistic)
    return [(one.step, one.kind) for one in found]


@pytest.mark.parametrize("kind", LINES)
def test_by_hand_a_line_warns_once_with_its_number(kind: str):
    split, values, number = LINES[kind]
    found = advise(
        [(2, split, values), (4, split, values)], batch_size=64, is_logistic=True
    )
    assert [(one.step, one.kind) for one in found] == [(2, kind)]
    assert number in found[0].text


@pytest.mark.parametrize("kind", NEAR)
def test_a_line_on_the_other_side_of_the_bound_warns_of_nothing(kind: str):
    assert kinds((2, LINES[kind][0], NEAR[kind])) == []


@pytest.mark.parametrize("kind", LINES)
def test_a_figure_that_is_no_number_warns_of_nothing(kind: str):
    split, values, _ = LINES[kind]
    for missing in (None, math.nan):
        assert kinds((2, split, dict.fromkeys(values, missing))) == []


def test_all_right_needs_128_examples_in_succession_within_an_epoch():
    right = {"rewards/accuracies": 1.0, "epoch": 0.5}
    wrong = right | {"rewards/accuracies": 0.9}
    one = [(1, "train", right), (2, "train", wrong), (3, "train", right)]
    assert kinds(*one) == []
    assert kinds(*one, (4, "train", right)) == [(4, "all_right")]
    assert kinds((9, "train", right | {"epoch": 1.1})) == []


def test_saturation_is_read_off_losses_that_are_log_sigmoids_only():
    assert kinds((2, "train", {"loss": 0.002}), is_logistic=False) == []


def test_evaluations_that_agree_to_the_last_digit_say_that_nothing_moved():
    same = {"loss": 0.5, "logps/chosen": -9.0, "samples/kl": 1.0}
    moved = same | {"logps/chosen": math.nextafter(-9.0, 0.0)}
    first, train = (0, "test", same), (10, "train", {"learning_rate": 1e-9})
    resting = (10, "train", {"learning_rate": 0.0})
    assert kinds(first, resting, (10, "test", same)) == []
    assert kinds(first, train, (10, "test", same)) == [(10, "unmoved")]
    assert kinds(first, train, (10, "test", moved)) == []


def test_by_hand_lengths_that_drift_by_half_and_by_three_errors():
    """From 20 to 31, the error of the difference 3 and then 5: 3.7 and 2.2 of it."""

    def length(mean: float, error: float) -> dict:
        return {"loss": mean, "samples/length": mean, "samples/length_se": error}

    first = (0, "test", length(20.0, 0.0))
    assert kinds(first, (5, "test", length(31.0, 3.0))) == [(5, "drifting")]
    assert kinds(first, (5, "test", length(31.0, 5.0))) == []
    assert kinds(first, (5, "test", length(29.0, 0.1))) == []
    assert kinds(first, (5, "test", length(13.0, 0.1))) == [(5, "drifting")]


def test_a_resumed_run_has_the_warnings_of_one_that_was_not_stopped(tmp_path):
    def record(keep_until: int, start: int) -> bytes:
        adviser = Adviser(batch_size=64, is_logistic=True)
        recording = Recording(tmp_path, keep_until, adviser, Trackers(()), {})
        for step in range(start, 7):
            values = {"rewards/margins": 7.0 * step, "loss": 0.7 - 0.1166 * step}
            recording.write(step, "train", values)
        return (tmp_path / "warnings.jsonl").read_bytes()

    whole = record(-1, 1)
    assert whole.count(b"\n") == 2
    assert len(list(MetricsFile(tmp_path / "metrics.jsonl", 6).lines())) == 6
    for stopped in (2, 3, 5, 6):
        assert record(stopped, stopped + 1) == whole
