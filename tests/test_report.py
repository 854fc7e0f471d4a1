"""The page of runs: what is on it, what it makes of missing data, and in a browser."""

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser, find_chromium

from dpojax.cli import main
from dpojax.config import LossConfig, TrainConfig
from dpojax.report.comparing import choose, combinations, runs_at
from dpojax.report.drawing import Line, lines
from dpojax.report.page import page
from dpojax.report.panels import reliability
from dpojax.report.reading import MOST_POINTS, curve, read_runs
from dpojax.report.serve import make_server
from dpojax.sweep_list import write_list

EVIL = "<script>alert(1)</script>\"'&"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_run(directory: Path, *, chosen: float = -1.0, text: str = "a text") -> Path:
    """A run of a hundred steps, as training would leave it."""
    directory.mkdir(parents=True)
    config = TrainConfig(model=text, data=("pairs",), loss=LossConfig(name="dpo"))
    code = f"def config() -> TrainConfig:\n    return {config!r}\n"
    (directory / "config.py").write_text(code, "utf-8")
    rng, metrics, held_out, samples = np.random.default_rng(0), [], [], []
    for step in range(1, 101):
        machine = {"tokens_per_second": 1000.0, "memory_gib": 1.5}
        figures = {"loss": 0.7 / step, "rewards/margins": 0.1 * step}
        metrics.append({"step": step, "split": "train"} | figures | machine)
    for step in (0, 50, 100):
        share = step / 100
        means = {
            "loss": 0.7 - 0.3 * share, "rewards/accuracies": 0.5 + 0.2 * share,
            "rewards/accuracies_se": 0.01, "rewards/margins": share,
            "logratios/chosen": chosen * share, "logratios/rejected": -3 * share,
            "samples/kl": 2 * share,
        }  # fmt: skip
        metrics.append({"step": step, "split": "test"} | means)
        rewards = {
            f"{side}_reward": (share * rng.normal(mean, 1, 64)).tolist()
            for side, mean in (("chosen", 1), ("rejected", 0))
        }
        lengths = {
            f"{side}_length": rng.integers(2, 30, 64).tolist()
            for side in ("chosen", "rejected")
        }
        held_out.append({"step": step} | rewards | lengths)
        samples.append({"step": step, "prompt": text, "completion": f"{text} {step}"})
    write_lines(directory / "metrics.jsonl", metrics)
    write_lines(directory / "held_out.jsonl", held_out)
    write_lines(directory / "samples.jsonl", samples)
    return directory


def page_of(paths: Sequence[str]) -> str:
    return page([runs_at(path) for path in paths])


class Elements(HTMLParser):
    """The tags of a page, and where it would fetch from."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "action", "data")
        self.addresses += [value or "" for name, value in attrs if name in names]


def test_a_page_has_every_plot_and_fetches_nothing(tmp_path: Path):
    runs = [str(write_run(tmp_path / name)) for name in ("one", "two")]
    text = page_of(runs)
    elements = Elements(text)
    assert elements.tags.count("svg") == elements.tags.count("figure") == 13
    assert "script" not in elements.tags
    assert all(address.startswith(("#", "data:,")) for address in elements.addresses)
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text
    assert len(text) < 1_000_000
    assert page_of(runs) == text


def test_what_others_wrote_is_escaped(tmp_path: Path):
    directory = write_run(tmp_path / EVIL.replace("/", "|"), text=EVIL)
    warning = {"step": 3, "kind": "kl", "text": EVIL}
    write_lines(directory / "warnings.jsonl", [warning])
    other = write_run(tmp_path / "other")
    text = page_of([str(directory), str(other)])
    assert "script" not in Elements(text).tags
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 5


def test_only_fields_that_differ_are_among_the_differences(tmp_path: Path):
    runs = [write_run(tmp_path / name, text=f"model-{name}") for name in ("a", "b")]
    table = page_of([str(run) for run in runs]).split("<th>differs</th>")[1]
    table = table.split("</table>")[0]
    assert re.findall(r"<th>([\w.]+)</th>", table.split("<tbody>")[1]) == ["model"]


@pytest.mark.parametrize("chosen, told", [(-1.0, True), (1.0, False)])
def test_displacement_is_told_where_chosen_answers_fell(
    tmp_path: Path, chosen: float, told: bool
):
    text = page_of([str(write_run(tmp_path / "run", chosen=chosen))])
    assert ("the loss dpop" in text) == told


def test_a_run_that_has_just_begun_has_a_page_that_says_what_is_missing(tmp_path: Path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("")
    text = page_of([str(directory)])
    assert "<svg" not in text
    assert "the run has just begun" in text
    assert "no held_out.jsonl" in text


def test_torn_lines_nulls_and_older_runs_are_read(tmp_path: Path):
    directory = write_run(tmp_path / "run")
    (directory / "held_out.jsonl").unlink()
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "split": "train", "loss": null}\n{"step": 102, "sp')
    (run,) = read_runs([str(directory)])
    assert [row["step"] for row in run.train][-2:] == [100, 101]
    assert curve(run.train, "loss")[0][-1] == 100
    assert "no held_out.jsonl" in page_of([str(directory)])


def test_figures_that_are_no_numbers_do_not_count(tmp_path: Path):
    directory = write_run(tmp_path / "run")
    row = {"step": 200, "chosen_reward": [None, 2.0], "rejected_reward": [0.0, 1.0]}
    lengths = {"chosen_length": [3, 3], "rejected_length": [4, 4]}
    write_lines(directory / "held_out.jsonl", [row | lengths])
    assert "(1 pairs)" in page_of([str(directory)])


def test_a_directory_that_is_no_run_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "is no run: it has no metrics.jsonl" in capsys.readouterr().err


def test_long_curves_are_thinned_to_their_ends():
    rows = [{"step": step, "loss": 0.5} for step in range(1, 100_001)]
    steps, values = curve(rows, "loss")
    assert len(steps) == len(values) == MOST_POINTS
    assert (steps[0], steps[-1]) == (1, 100_000)


def test_a_settings_file_is_read_and_not_run(tmp_path: Path):
    directory = write_run(tmp_path / "run")
    code = "open('made', 'w')\n" + (directory / "config.py").read_text("utf-8")
    (directory / "config.py").write_text(code, "utf-8")
    (run,) = read_runs([str(directory)])
    assert run.settings["loss.name"] == "'dpo'"
    assert run.settings["optimizer.learning_rate"] == "None"
    assert not Path("made").exists()


def test_by_hand_the_calibration_of_margins():
    """Of |margin| = log 3 confidence is 3/4: three of four right is calibrated.

    With all signs turned one of four is right, 1/2 off.
    """
    margin = np.log(3) * np.array([1.0, 1.0, 1.0, -1.0] * 16)
    for sign, share, distance in ((1, 0.75, 0.0), (-1, 0.25, 0.5)):
        bins, found = reliability(sign * margin)
        np.testing.assert_allclose(bins[0], 0.75)
        np.testing.assert_allclose(bins[1], share)
        assert found == pytest.approx(distance, abs=1e-12)


def test_names_with_dollars_are_no_formulas():
    line = Line("a$b$^", "#010210", (np.arange(3.0), np.arange(3.0)))
    assert "a$b$^" in lines([line], "loss")


def test_watching_serves_the_newest_page_to_this_machine_alone(tmp_path: Path):
    directory = write_run(tmp_path / "run")
    with make_server([str(directory)], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/"
            assert server.server_address[0] == "127.0.0.1"
            with urllib.request.urlopen(address) as answer:
                first = answer.read().decode()
            assert 'http-equiv="refresh"' in first
            samples = [{"step": 0, "prompt": "new", "completion": "newest"}]
            write_lines(directory / "samples.jsonl", samples)
            with urllib.request.urlopen(address) as answer:
                assert "newest" in answer.read().decode()
            foreign = urllib.request.Request(address, headers={"Host": "evil.example"})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(foreign)
            refused.value.close()
        finally:
            server.shutdown()
            thread.join()


CHROMIUM = find_chromium()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_draws_every_plot_at_every_width_and_asks_nobody(tmp_path: Path):
    runs = [str(write_run(tmp_path / name)) for name in ("one", "two")]
    path = tmp_path / "report.html"
    main(["report", *runs, "--output", str(path)])
    assert CHROMIUM is not None
    with browser(CHROMIUM, tmp_path / "profile") as tab:
        for width in (390, 1280):
            tab.open(path, width)
            boxes = tab.value(
                "[...document.querySelectorAll('figure svg')].map(plot => {"
                "const box = plot.getBoundingClientRect();"
                "return [box.width, box.height, plot.querySelectorAll('path').length]})"
            )
            assert len(boxes) == 13
            assert all(min(box[:2]) > 150 and box[2] > 3 for box in boxes)
            assert max(box[0] for box in boxes) <= width
            assert tab.value("document.documentElement.scrollWidth") <= width
            asked = [
                one["request"]["url"] for one in tab.told("Network.requestWillBeSent")
            ]
            assert [url for url in asked if not url.startswith("data:")] == [
                path.as_uri()
            ]
            for kind in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                assert tab.told(kind) == []
            assert tab.told("Log.entryAdded") == []


def test_by_hand_a_sweep_is_compared_over_its_seeds_and_a_choice_is_made(
    tmp_path: Path,
):
    """Accuracies 0.70 and 0.72, then 0.70 and 0.70: means 0.71 and 0.70, error 0.01.

    The t interval of two seeds is 12.7 errors. The second combination is within one
    error of the first and has half its KL: it is chosen.
    """
    changes = [{"loss.beta": beta, "seed": s} for beta in ("0.1", "0.5") for s in "01"]
    write_list(tmp_path / "sweep", "all", changes)
    figures = ((0.70, 2.0), (0.72, 2.0), (0.70, 1.0), (0.70, 1.0))
    for number, (accuracy, kl) in enumerate(figures):
        directory = write_run(tmp_path / "sweep" / str(number))
        means = {"rewards/accuracies": accuracy, "samples/kl": kl, "loss": 0.5}
        line = {"step": 100, "split": "test", "rewards/margins": 1.0} | means
        write_lines(directory / "metrics.jsonl", [line])
    path = str(tmp_path / "sweep")
    listed = runs_at(path)
    first, second = combinations(listed, read_runs(listed.directories))
    assert (first.name, second.name) == ("loss.beta 0.1", "loss.beta 0.5")
    np.testing.assert_allclose(first.accuracy, (0.71, 0.01, 0.1270620), rtol=1e-6)
    assert first.is_on_frontier and second.is_on_frontier
    assert choose([first, second])[0] == second
    text = page_of([path])
    assert "loss.beta 0.5 – chosen" in text and "71.0% ± 12.7%" in text
    # Of one that has not begun nothing is there to compare.
    write_list(tmp_path / "new", "all", changes)
    assert runs_at(str(tmp_path / "new")).directories == []
