"""What a run leaves on disk, apart from metrics and checkpoints.

    config.py       the full configuration; `dpojax train` with this file repeats it
    metrics.jsonl   one line of metrics a step that was logged
    skipped.jsonl   bad records that were left out, if there were any, and why
    samples.jsonl   the same held-out prompts, continued at each evaluation
    model/          the model without its weights; with a checkpoint it makes an export
    checkpoints/    states of training
    final/          the trained model, in Hugging Face's form

This file knows no training.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from dpojax.config import DistributedConfig, TrainConfig
from dpojax.data.bad_records import Skipped
from dpojax.data.tokenize import Tokenizer
from dpojax.loading import Loaded, new_directory
from dpojax.models.huggingface import write_settings
from dpojax.models.peft import write_config
from dpojax.processes import decided_by_first, only_first, wait_for_all
from dpojax.whole_files import write_json_lines


def choose_directory(config: TrainConfig) -> Path:
    """The directory of a new run, not made yet, or of the one to resume.

    Process 0 decides: the others might come after it has made it, or a second later.

    Raises:
      ValueError: if a new run would write where something is, or there is none to
        resume.
    """
    return Path(decided_by_first(lambda: str(_choose(config))))


def _choose(config: TrainConfig) -> Path:
    if config.resume:
        if config.output is None or not (Path(config.output) / "config.py").is_file():
            raise ValueError("--resume needs the --output of a run that has started.")
        return Path(config.output)
    return new_directory(config.output or default_name(config.loss.name))


def default_name(kind: str) -> str:
    """A directory named for the kind of run and the time."""
    kind = re.sub(r"[^\w.]+", "-", kind)  # a sum, or a path of the user's
    return f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


def begin_directory(directory: Path, config: TrainConfig, loaded: Loaded) -> None:
    """Begins a run's directory, and looks whether all processes see it.

    Raises:
      ValueError: if they do not share a file system.
    """
    _write_frame(directory, config, loaded)
    wait_for_all(f"began {directory}")
    if not (directory / "config.py").is_file():
        raise ValueError(
            f"What process 0 writes to {directory} is not seen by process "
            f"{jax.process_index()}; give an --output on a file system that all share."
        )


@only_first
def _write_frame(directory: Path, config: TrainConfig, loaded: Loaded) -> None:
    """The model but its weights, then the configuration."""
    frame = directory / "model"
    frame.mkdir(parents=True, exist_ok=True)
    write_settings(frame, loaded.settings, "float32", loaded.generation_settings)
    model = loaded.model
    if model.lora is not None:
        write_config(frame, model.lora, model.params, loaded.settings, loaded.base)
    loaded.tokenizer.save_pretrained(frame)
    again = replace(
        config, output=None, stop_after=None, distributed=DistributedConfig()
    )
    text = (
        '"""The configuration of a run; `dpojax train` with it repeats the run."""\n\n'
        "from dpojax.config import DistributedConfig, LoraConfig, LossConfig, "
        "MeshConfig, MovingConfig, OptimizerConfig, TrainConfig\n\n\n"
        f"def config() -> TrainConfig:\n    return {again!r}\n"
    )
    (directory / "config.py").write_text(text, encoding="utf-8")


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
