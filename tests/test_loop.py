"""The loop: when figures are fetched, when batches are placed, what is compiled."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from test_run import metrics_of

from dpojax import run as run_module
from dpojax.compilation_cache import use_compilation_cache
from dpojax.config import TrainConfig
from dpojax.metrics import Ratio
from dpojax.run import run, run_to_end
from dpojax.sharding import put_ahead
from dpojax.step_log import StepLog
from dpojax.train_step import TrainState
from dpojax.training import Training


class Watched:
    """An array that tells when the host waits for it."""

    def __init__(self, array: jax.Array, tell: Callable[[], None]):
        self.array, self.tell = array, tell

    def __array__(self) -> np.ndarray:
        self.tell()
        return np.asarray(self.array)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Numbers of dispatched steps, and "fetch" where the host waited for any."""
    found: list[Any] = []
    make = run_module.make_training

    def fetched() -> None:
        if found[-1] != "fetch":
            found.append("fetch")

    def make_watched(*args: Any) -> Training:
        training = make(*args)

        def step(*args: Any) -> tuple[Any, Any]:
            found.append(1 + sum(event != "fetch" for event in found))
            state, sums = training.step(*args)
            return state, jax.tree.map(lambda leaf: Watched(leaf, fetched), sums)

        return training._replace(step=step)

    monkeypatch.setattr(run_module, "make_training", make_watched)
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where commands keep compiled programs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # As where nothing is said; the tests have a cache of their own.
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()
    yield tmp_path / "dpojax" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_run_waits_once_an_interval_and_when_the_next_step_is_on_its_way(
    events: list[Any], config: TrainConfig, place: Path
):
    result = run(
        replace(
            config,
            output=str(place / "run"),
            steps=7,
            log_every=3,
            evaluate_every=7,
            save_every=7,
            sample_prompts=0,
        )
    )
    assert events == [1, 2, 3, 4, "fetch", 5, 6, 7, "fetch"]
    rows = [row for row in metrics_of(result.directory) if row["split"] == "train"]
    assert [row["step"] for row in rows] == [3, 6, 7]


def test_sigterm_saves_and_a_run_that_it_stopped_between_lines_leaves_the_same_ones(
    config: TrainConfig, place: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(config, log_every=2, evaluate_every=4, sample_prompts=0)
    whole = run(replace(config, output=str(place / "undisturbed")))
    make = run_module.make_training

    def make_told(*args: Any) -> Training:
        training = make(*args)

        def step(state: TrainState, *rest: Any) -> tuple[Any, Any]:
            if state.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return training.step(state, *rest)

        return training._replace(step=step)

    told = replace(config, output=str(place / "told"))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "make_training", make_told)
        assert run(told).step == 3
        with pytest.raises(SystemExit, match="Told to end: nothing is made of"):
            run_to_end(replace(told, output=str(place / "told again")))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(replace(told, resume=True))
    assert metrics_of(place / "told") == metrics_of(whole.directory)


def sums(loss: float) -> dict[str, Ratio]:
    one = jnp.ones(())
    return {"loss": Ratio(loss * one, one), "grad_norm": Ratio(one, one)}


def test_by_hand_lines_of_two_intervals():
    """Losses 1 and 3, then 5; 10 tokens in 2 s, then, after a pause, 6 in 3 s."""
    lines, times = [], iter([0.0, 2.0, 2.0, 100.0, 103.0])
    log = StepLog(
        lambda step, values: lines.append((step, values)), clock=lambda: next(times)
    )
    log.add(1, sums(1.0), 4)
    log.add(2, sums(3.0), 6)
    log.end_interval()
    assert not lines
    log.catch_up()
    with log.paused():
        pass
    log.add(3, sums(5.0), 6)
    log.end_interval()
    log.catch_up()
    log.catch_up()  # nothing is due
    first, second = lines
    one = {"loss": 2.0, "grad_norm": 1.0, "tokens_per_second": 5.0}
    assert first == (2, one)
    assert second == (3, one | {"loss": 5.0, "tokens_per_second": 2.0})
    assert log.median_speed == 3.5


def test_steps_before_a_restart_are_of_the_line_that_comes_after_it():
    """Losses 0.1 and 2, then, in another process, 6: the line of 0.1 and 2 and 6."""
    lines = []
    log = StepLog(lambda step, values: pytest.fail("written"))
    log.add(1, sums(0.1), 1)
    first = json.loads(json.dumps(log.unlogged()))
    log = StepLog(lambda step, values: pytest.fail("written"), first)
    log.add(2, sums(2.0), 1)
    both = json.loads(json.dumps(log.unlogged()))
    log = StepLog(lambda step, values: lines.append((step, values["loss"])), both)
    log.add(3, sums(6.0), 1)
    log.end_interval()
    log.catch_up()
    assert lines == [(3, (float(np.float32(0.1)) + 8) / 3)]
    assert log.unlogged() == []


def test_a_step_that_is_dispatched_before_a_line_is_written_is_of_the_next_line():
    lines = []
    log = StepLog(lambda step, values: lines.append((step, values["loss"])))
    log.add(1, sums(1.0), 1)
    log.end_interval()
    log.add(2, sums(7.0), 1)
    log.catch_up()
    log.end_interval()
    log.catch_up()
    assert lines == [(1, 1.0), (2, 7.0)]


def test_a_loss_that_is_no_number_is_not_written_but_names_its_step():
    log = StepLog(lambda *_: pytest.fail("written"))
    for step, loss in ((6, 1.0), (7, float("nan")), (8, float("nan"))):
        log.add(step, sums(loss), 1)
    log.end_interval()
    with pytest.raises(FloatingPointError, match="The loss of step 7 is nan"):
        log.catch_up()


def test_the_next_batch_is_on_its_way_before_a_batch_is_used():
    order = []

    def put(batch: int) -> int:
        order.append(f"put {batch}")
        return -batch

    for batch, placed in put_ahead(range(1, 4), put):
        assert placed == -batch
        order.append(f"use {batch}")
    assert order == ["put 1", "put 2", "use 1", "put 3", "use 2", "use 3"]


def test_a_program_of_another_process_is_not_compiled_again(cache: Path):
    """Clearing what is in memory stands for the end of a process."""
    use_compilation_cache()
    counted: list[str] = []

    def count(event: str, **_: str | int) -> None:
        counted.append(event)

    jax.monitoring.register_event_listener(count)
    try:
        for _ in range(2):
            jax.clear_caches()
            counted.clear()
            jax.jit(lambda x: jnp.sin(x) @ x)(np.ones((2, 2), np.float32))
    finally:
        jax.monitoring.unregister_event_listener(count)
    assert len(list(cache.iterdir())) >= 1
    assert "/jax/compilation_cache/cache_hits" in counted
    assert "/jax/compilation_cache/cache_misses" not in counted


def test_what_the_environment_says_of_the_cache_stays(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "other"))
    use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert not cache.exists()


def test_where_no_cache_can_be_written_there_is_none(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "dpojax").write_text("a file where the directory would be")
    use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_cache_that_is_turned_off_leaves_no_directory(cache: Path):
    jax.config.update("jax_enable_compilation_cache", False)
    use_compilation_cache()
    assert not cache.exists()
