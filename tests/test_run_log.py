"""What a run says before and while it trains."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpojax.config import LossConfig, MovingConfig, TrainConfig
from dpojax.losses.make import make_loss
from dpojax.metrics import Ratio
from dpojax.run_log import Plan, device_bytes, summary, time_line
from dpojax.step_log import StepLog


class State(NamedTuple):
    params: dict[str, np.ndarray]


def plan(loss: str) -> Plan:
    return Plan(
        loss=make_loss(loss),
        state=State({"a": np.zeros(1, np.float32)}),
        others=None,
        num_trained=1_000,
        num_parameters=5_000,
        num_train=90,
        num_test=10,
        num_steps=12,
        learning_rate=1e-6,
        mesh={"data": 4, "fsdp": 1},
        shape=(8, 64),
        num_tokens=384,
    )


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpojax.run_log.device_bytes", lambda tree: 3 << 20)


def test_by_hand_a_summary_has_the_padding_and_the_settings(no_memory: None):
    """384 tokens on 8 x 64 positions: a quarter is padding."""
    config = TrainConfig(model="m", loss=LossConfig(name="dpo"), batch_size=16)
    text = summary(config, plan("dpo"))
    for part in (
        "1,000 trained of 5,000",
        "dpo (beta 0.1, label_smoothing 0.0)",
        "25.0% padding",
        "12 of 16 examples; 384 tokens",
        "mesh data 4\n",
        "3.0 MiB a device",
        "the policy at step 0\n",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_summary_tells_of_references_that_move_or_are_not_needed(no_memory: None):
    moving = TrainConfig(model="m", moving=MovingConfig(kind="bema"))
    assert "the policy at step 0, moved by bema" in summary(moving, plan("dpo"))
    assert "none is needed" in summary(TrainConfig(model="m"), plan("simpo"))


def test_by_hand_an_array_takes_its_shard_of_a_device_once():
    """8 x 4 float32 over four devices: 32 bytes; an array everywhere: 128."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    array = np.zeros((8, 4), np.float32)
    split = jax.device_put(array, NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(array, NamedSharding(mesh, PartitionSpec()))
    assert device_bytes([split, split]) == 32
    assert device_bytes({"a": split, "b": whole}) == 160


def test_the_time_that_is_left_is_told_after_an_interval_without_compilation():
    clock = iter([0.0, 60.0, 64.0])
    log = StepLog(lambda *_: None, fetch=lambda x: x, clock=lambda: next(clock))
    one = jnp.float32(1)
    sums = {name: Ratio(one, one) for name in ("loss", "grad_norm")}
    told = []
    for step in (2, 4):
        log.add(step - 1, sums, 10)
        log.add(step, sums, 10)
        log.end_interval()
        log.catch_up()
        told.append(log.seconds_left(1_900))
    assert told == [None, 3_800.0]
    assert time_line(told[0]) == "" and time_line(told[1]) == "  left 1:03:20"
