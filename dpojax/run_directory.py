"""What a run leaves on disk, apart from metrics and checkpoints.

    config.py       the full configuration; `dpojax train` with this file repeats it
    metrics.jsonl   one line of metrics a step that was logged
    held_out.jsonl  rewards and lengths of held-out examples, a line an evaluation
    warnings.jsonl  what metrics warn of, each kind once
    skipped.jsonl   bad records that were left out, if there were any, and why
    tracked_as      the name by which trackers know the run, where it has any
    tensorboard/    its events, and wandb/ what that client keeps, likewise
    samples.jsonl   the same held-out prompts, continued at each evaluation
    model/          the model without its weights; with a checkpoint it makes an export
    checkpoints/    states of training
    lock            held by the process that writes here
    final/          the trained model, in Hugging Face's form
    nan/            of a step that was not finite: what a report of it needs

This file knows no training.
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from dpojax.config import TrainConfig
from dpojax.data.bad_records import Skipped
from dpojax.data.tokenize import Tokenizer
from dpojax.data.tokenizer_files import write_tokenizer
from dpojax.loading import Loaded, new_directory
from dpojax.models.huggingface import write_settings
from dpojax.models.peft import write_config
from dpojax.processes import decided_by_first, only_first, wait_for_all
from dpojax.provenance import shared_settings
from dpojax.whole_files import (
    unfinished_directory,
    whole_directory,
    write_bytes,
    write_json_lines,
)


class RunDirectory:
    """Where a run writes."""

    def __init__(self, path: Path, locks: list[FileLock]):
        """See `open_directory`."""
        self.path = path
        self._locks = locks

    def begin(self, config: TrainConfig, loaded: Loaded) -> None:
        """Writes what is there before the first step.

        A new directory appears by rename, locked and with everything in it.

        Raises:
          ValueError: if another run has made it meanwhile; if the processes do not
            share a file system.
        """
        self._make(config, loaded)
        wait_for_all(f"began {self.path}")
        if not (self.path / "config.py").is_file():
            raise ValueError(
                f"What process 0 writes to {self.path} is not seen by process "
                f"{jax.process_index()}; give an --output on a file system that all "
                "share."
            )

    @only_first
    def _make(self, config: TrainConfig, loaded: Loaded) -> None:
        if self._locks:  # of a run that is resumed, from its beginning
            _write_frame(self.path, config, loaded)
            return
        try:
            with unfinished_directory(self.path) as unfinished:
                self._locks.append(_locked(unfinished, self.path))
                _write_frame(unfinished, config, loaded)
        except FileExistsError:
            raise ValueError(
                f"{self.path} already exists; choose another --output."
            ) from None


def _write_frame(directory: Path, config: TrainConfig, loaded: Loaded) -> None:
    """The model but its weights, then the configuration."""
    with whole_directory(directory / "model") as frame:
        write_settings(frame, loaded.settings, "float32", loaded.generation_settings)
        model = loaded.model
        if model.lora is not None:
            write_config(frame, model.lora, model.params, loaded.settings, loaded.base)
        write_tokenizer(loaded.tokenizer, frame)
    text = (
        '"""The configuration of a run; `dpojax train` with it repeats the run."""\n\n'
        "from dpojax.config import DistributedConfig, LoraConfig, LossConfig, "
        "MeshConfig, MovingConfig, OptimizerConfig, TrainConfig\n\n\n"
        f"def config() -> TrainConfig:\n    return {shared_settings(config)!r}\n"
    )
    write_bytes(directory / "config.py", text.encode())


@contextmanager
def open_directory(config: TrainConfig) -> Iterator[RunDirectory]:
    """The directory of a new run, not made yet, or of the one to resume.

    Process 0 decides: the others might come after it has made it, or a second later. It
    also keeps other runs out until the end.

    Raises:
      ValueError: if a new run would write where something is, or there is none to
        resume, or another run writes there.
    """
    locks: list[FileLock] = []  # of process 0: the one that it holds

    def choose() -> str:
        path = _choose(config)
        if config.resume:
            locks.append(_locked(path, path))
        return str(path)

    try:
        yield RunDirectory(Path(decided_by_first(choose)), locks)
    finally:
        for lock in locks:
            lock.release()


def _choose(config: TrainConfig) -> Path:
    if config.resume:
        if config.output is None or not (Path(config.output) / "config.py").is_file():
            raise ValueError("--resume needs the --output of a run that has started.")
        return Path(config.output)
    return new_directory(config.output or default_name(config.loss.name))


def _locked(path: Path, shown: Path) -> FileLock:
    """A lock that the system takes back when the process ends, however it ends."""
    lock = FileLock(path / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"Another run writes to {shown}; wait for it, or choose another --output."
        ) from None
    return lock


def default_name(kind: str) -> str:
    """A directory named for the kind of run and the time."""
    kind = re.sub(r"[^\w.]+", "-", kind)  # a sum, or a path of the user's
    return f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


def write_skipped(directory: Path, skipped: Sequence[Skipped]) -> None:
    """Lists the bad records that were left out, where there are any."""
    rows = [
        {"split": part.split, "reason": reason}
        for part in skipped
        for reason in part.reasons
    ]
    if rows:
        write_json_lines(directory / "skipped.jsonl", rows)


@only_first
def write_samples(
    directory: Path,
    step: int,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
) -> None:
    """Adds prompts and their completions as text.

    Those of this step and of later ones are replaced: a resumed run comes by again.
    """
    path = directory / "samples.jsonl"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    complete = old.split("\n")[:-1]  # a line cut short by a crash has no end
    rows = [row for row in map(json.loads, complete) if row["step"] < step]

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    for prompt, completion in zip(prompts, completions, strict=True):
        texts = {"prompt": text(prompt), "completion": text(completion)}
        rows.append({"step": step} | texts)
    write_json_lines(path, rows)
