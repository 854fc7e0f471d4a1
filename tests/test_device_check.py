"""The check that `tpu_setup.sh` ends with, on CPU devices and in two processes."""

import os
import random
import subprocess
import sys

import jax
import pytest

from dpojax import device_check
from dpojax.device_check import check_devices, sum_over_devices


def start(process: int, num_processes: int, job: int, expected: int):
    """A process that finds the others as a job of SLURM does."""
    slurm = {
        "SLURM_JOB_ID": str(job),  # which decides the port
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(num_processes),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    arguments = ("--platform", "cpu", "--num-processes", str(expected))
    return subprocess.Popen(
        (sys.executable, "-m", "dpojax.device_check", *arguments),
        env=os.environ | slurm | devices | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_device_adds_its_one():
    assert sum_over_devices() == jax.device_count() == 4
    assert check_devices("cpu").startswith("4 devices of kind cpu in 1 processes, 4")


def test_devices_of_another_platform_are_refused():
    with pytest.raises(ValueError, match="No tpu is visible, only cpu; install dpojax"):
        check_devices("tpu")


def test_a_wrong_sum_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_check, "sum_over_devices", lambda: 3.0)
    with pytest.raises(ValueError, match="ones over 4 devices gave 3; one of them or"):
        check_devices("cpu")


def test_two_processes_find_each_other_and_add_up():
    job = random.randrange(10**6)
    processes = [start(process, 2, job, expected=2) for process in (0, 1)]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()  # where one fails, the other waits for it
    line = "4 devices of kind cpu in 2 processes, 2 of them here; a sum over all"
    assert all(line in out for out, _ in said), said


def test_a_process_that_is_missing_is_noticed():
    process = start(0, 1, random.randrange(10**6), expected=2)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "1 processes take part instead of 2; run this on all" in said
