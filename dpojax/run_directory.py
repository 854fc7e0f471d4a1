"""What a run leaves on disk, apart from metrics and checkpoints.

Checkpoints may lie elsewhere, and hold what it takes to make the directory again on
another machine.

    config.py       the full configuration; `dpojax train` with this file repeats it
    metrics.jsonl   one line of metrics a step that was logged
    held_out.jsonl  rewards and lengths of held-out examples, a line an evaluation
    warnings.jsonl  what metrics warn of, each kind once
    skipped.jsonl   bad records that were left out, if there were any, and why
    tracked_as      the name by which trackers know the run, where it has any
    tensorboard/    its events, and wandb/ what that client keeps, likewise
    samples.jsonl   the same held-out prompts, continued at each evaluation
    model/          the model without its weights; with a checkpoint it makes an export
    checkpoints/    states of training, or checkpoints_at, which says where they are
    lock            held by the process that writes here
    final/          the trained model, in Hugging Face's form
    nan/            of a step that was not finite: what a report of it needs

This file knows no training.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from dpojax.checkpoint import read_files
from dpojax.config import TrainConfig
from dpojax.data.bad_records import Skipped
from dpojax.data.tokenize import Tokenizer
from dpojax.data.tokenizer_files import write_tokenizer
from dpojax.loading import Loaded, new_directory
from dpojax.models.adapter_config import write_config
from dpojax.models.huggingface import write_settings
from dpojax.object_store import Store, as_place
from dpojax.processes import decided_by_first, only_first, wait_for_all
from dpojax.provenance import shared_settings
from dpojax.whole_files import (
    unfinished_directory,
    whole_directory,
    write_bytes,
    write_json_lines,
)

_ELSEWHERE = "checkpoints_at"
_SMALL_FILES = ("config.py", "metrics.jsonl", "held_out.jsonl", "samples.jsonl",
                "warnings.jsonl", "skipped.jsonl", "tracked_as")  # fmt: skip


class RunDirectory:
    """Where a run writes."""

    def __init__(self, path: Path, elsewhere: str | None, locks: list[FileLock]):
        """See `open_directory`."""
        self.path = path
        self.checkpoints = elsewhere or str(path / "checkpoints")
        self._elsewhere = elsewhere
        self._locks = locks

    def begin(self, config: TrainConfig, loaded: Loaded, step: int) -> None:
        """Writes what is there before a step is taken, where it is not there.

        A new directory appears by rename, locked and with everything in it. One of a
        run that has checkpoints is made again as it was at that step.

        Args:
          config: of the run.
          loaded: its model.
          step: where it goes on, of which there is a checkpoint, or 0.

        Raises:
          ValueError: if another run has made it meanwhile, or keeps its checkpoints in
            the same place; if the processes do not all see where these are.
        """
        self._make(config, loaded, step)
        wait_for_all(f"began {self.path}")
        place = self._elsewhere or self.path
        if not Store(place).has("config.py"):
            remedy = (
                "--output on a file system that all share, or --checkpoints in a bucket"
                if self._elsewhere is None
                else "--checkpoints in a place that all reach"
            )
            raise ValueError(
                f"What process 0 writes to {place} is not seen by process "
                f"{jax.process_index()}; give {remedy}."
            )

    @only_first
    def _make(self, config: TrainConfig, loaded: Loaded, step: int) -> None:
        if self._locks and step:
            return
        if self._locks:  # of a run that is resumed, from its beginning
            self._write_beginning(self.path, config, loaded)
            return
        try:
            with unfinished_directory(self.path) as unfinished:
                self._locks.append(_locked(unfinished, self.path))
                if step == 0:
                    self._write_beginning(unfinished, config, loaded)
                else:
                    self._write_frame(unfinished, loaded)
                    files = read_files(self.checkpoints, step)
                    _write_small_files(unfinished, files)
        except FileExistsError:
            raise ValueError(
                f"{self.path} already exists; choose another --output."
            ) from None

    def _write_beginning(
        self, directory: Path, config: TrainConfig, loaded: Loaded
    ) -> None:
        """What there is before the first step, the configuration last."""
        self._write_frame(directory, loaded)
        content = _as_source(config).encode()
        if self._elsewhere is not None:
            _claim(Store(self._elsewhere), content, is_new=not config.resume)
        write_bytes(directory / "config.py", content)

    def _write_frame(self, directory: Path, loaded: Loaded) -> None:
        """The model but its weights, and where to find these."""
        with whole_directory(directory / "model") as frame:
            settings, model = loaded.settings, loaded.model
            write_settings(frame, settings, "float32", loaded.generation_settings)
            if model.lora is not None:
                write_config(frame, model.lora, model.params, settings, loaded.base)
            write_tokenizer(loaded.tokenizer, frame)
        if self._elsewhere is not None:
            write_bytes(directory / _ELSEWHERE, f"{self._elsewhere}\n".encode())


def checkpoints_of(directory: Path) -> str:
    """Where the checkpoints of a run are: a directory, or gs://bucket/path."""
    path = directory / _ELSEWHERE
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    return str(directory / "checkpoints")


def read_small_files(directory: Path) -> dict[str, str]:
    """What makes a run's directory again together with what was loaded, by names."""
    paths = [directory / name for name in _SMALL_FILES]
    return {p.name: p.read_text(encoding="utf-8") for p in paths if p.is_file()}


def _write_small_files(directory: Path, files: Mapping[str, str]) -> None:
    for name in _SMALL_FILES:
        if name in files:
            write_bytes(directory / name, files[name].encode())


def _claim(store: Store, content: bytes, *, is_new: bool) -> None:
    """Leaves a configuration where the checkpoints of its run are to be."""
    if not is_new:
        store.write("config.py", content)
        return
    try:
        store.create("config.py", content)
    except FileExistsError:
        raise ValueError(_used(store.place)) from None


def _used(place: str) -> str:
    return (
        f"{place} already holds a run's checkpoints; choose other --checkpoints, or "
        "continue that run by --resume."
    )


def _as_source(config: TrainConfig) -> str:
    return (
        '"""The configuration of a run; `dpojax train` with it repeats the run."""\n\n'
        "from dpojax.config import DistributedConfig, LoraConfig, LossConfig, "
        "MeshConfig, MovingConfig, OptimizerConfig, TrainConfig\n\n\n"
        f"def config() -> TrainConfig:\n    return {shared_settings(config)!r}\n"
    )


@contextmanager
def open_directory(config: TrainConfig) -> Iterator[RunDirectory]:
    """The directory of a new run, not made yet, or of the one to resume.

    Process 0 decides: the others might come after it has made it, or a second later. It
    also keeps other runs out until the end.

    Raises:
      ValueError: if a new run would write where something is, or there is none to
        resume, or another run writes there.
    """
    elsewhere = None if config.checkpoints is None else as_place(config.checkpoints)
    locks: list[FileLock] = []  # of process 0: the one that it holds

    def choose() -> str:
        path = _choose(config, elsewhere)
        if has_begun(path):
            locks.append(_locked(path, path))
        return str(path)

    try:
        yield RunDirectory(Path(decided_by_first(choose)), elsewhere, locks)
    finally:
        for lock in locks:
            lock.release()


def has_begun(directory: Path) -> bool:
    """Whether there is a run to go on with."""
    return (directory / "config.py").is_file()


def _choose(config: TrainConfig, elsewhere: str | None) -> Path:
    if config.resume:
        return _choose_begun(config, elsewhere)
    path = new_directory(config.output or default_name(config.loss.name))
    if elsewhere is None:
        return path
    if Path(elsewhere).is_relative_to(path.absolute()):
        raise ValueError(
            f"{elsewhere} is in the run directory, where checkpoints are by default; "
            "leave out --checkpoints, or choose another place."
        )
    if Store(elsewhere).names():
        raise ValueError(_used(elsewhere))
    return path


def _choose_begun(config: TrainConfig, elsewhere: str | None) -> Path:
    """Of a run that is resumed: its directory, or that of its checkpoints alone."""
    if config.output is None:
        raise ValueError("--resume needs the --output of a run that has started.")
    path = Path(config.output)
    if has_begun(path):
        own = checkpoints_of(path)
        if own != (elsewhere or str(path / "checkpoints")):
            raise ValueError(
                f"The checkpoints of {path} are in {own}; resume it with the same "
                "--checkpoints that it was begun with."
            )
        return path
    if elsewhere is None or not Store(elsewhere).has("config.py"):
        raise ValueError(
            "--resume needs the --output of a run that has started, or where there is "
            "none its --checkpoints."
        )
    return new_directory(config.output)


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
