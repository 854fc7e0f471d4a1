"""What holds for every test: four virtual CPU devices, no network, shared material."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from compilation import keep_programs, quick_flags
from hypothesis import settings

if TYPE_CHECKING:  # the tests import it only once the environment is set
    from collections.abc import Iterator

    from dpojax.config import TrainConfig

# Set before any test module imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = ("--xla_force_host_platform_device_count=4", *quick_flags())
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS))
# Threads of XLA's pools: where devices outnumber cores, those that wait for each other
# in a collective would otherwise take all of them, and the others never join.
os.environ.setdefault("NPROC", "16")
os.environ["HF_HUB_OFFLINE"] = "1"
# torch's threads spin while they wait, on cores that the other tests need.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_PROGRAMS = keep_programs()

# Machines that are shared are slow at times, which is no failure.
settings.register_profile("dpojax", deadline=None)
settings.load_profile("dpojax")


# Begun first, so that at the end no core waits for another's whole file.
_LONGEST = (
    "test_train_step",
    "test_run_lora",
    "test_parity",
    "test_run_objectives",
    "test_loop",
    "test_not_finite",
    "test_experts",
    "test_lora",
    "test_sweep",
    "test_processes",
    "test_storage",
    "test_sentiment",
    "test_bucket",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files by when they are begun; within one, nothing changes."""
    items.sort(key=lambda item: item.path.stem not in _LONGEST)


@pytest.fixture(scope="module", autouse=True)
def _forget_what_stays() -> Iterator[None]:
    """What JAX keeps of a file's programs is not searched for garbage ever again.

    There is more of it after each file, and each search would go through all.
    """
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Removes what was compiled."""
    shutil.rmtree(_PROGRAMS)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The material beside the repository: oracles, tokenizers, recorded runs."""
    beside = Path(__file__).parents[2] / "shared"
    path = Path(os.environ.get("DPOJAX_SHARED", beside))
    if not path.is_dir():
        pytest.skip(f"needs the material in {path}; set DPOJAX_SHARED to where it is")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the embedded task's tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("models"))


def make_tiny_model(directory: Path) -> Path:
    """Writes the tokenizer of the embedded task and, with it, a model."""
    from dpojax.command_config import InitConfig
    from dpojax.commands import init
    from dpojax.data.synthetic import make_tokenizer

    tokenizer, output = str(directory / "tokenizer"), str(directory / "model")
    make_tokenizer().save_pretrained(tokenizer)
    return init(InitConfig(output=output, tokenizer=tokenizer, preset="tiny"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model and twenty pairs of the embedded reviews."""
    from dpojax.data.labels import label_pairs
    from dpojax.data.synthetic import make_reviews, split_review

    directory = tmp_path_factory.mktemp("run")
    make_tiny_model(directory)
    generation = json.dumps({"eos_token_id": [2, 5]})
    (directory / "model/generation_config.json").write_text(generation)
    reviews = [split_review(review) for review in make_reviews(96, seed=0)]
    openings = [opening for opening, _ in reviews[::2]]
    groups = [[a[1], b[1]] for a, b in zip(reviews[::2], reviews[1::2], strict=True)]
    pairs = label_pairs(openings, groups)[:20]
    text = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (directory / "pairs.jsonl").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def config(place: Path) -> TrainConfig:
    """A run of four steps on those pairs."""
    from dpojax.config import OptimizerConfig, TrainConfig

    return TrainConfig(
        model=str(place / "model"),
        data=(str(place / "pairs.jsonl"),),
        output=str(place / "whole"),
        test_size=4,
        max_length=96,
        batch_size=4,
        steps=4,
        log_every=1,
        evaluate_every=2,
        save_every=2,
        sample_prompts=2,
        sample_tokens=4,
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
