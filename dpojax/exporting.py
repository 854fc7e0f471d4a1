"""The export command: what a run trained, or adapters in their base, as a directory.

This file knows no training.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dpojax.checkpoint import Checkpoints, check_whole, describe, find_newest
from dpojax.command_config import ExportConfig
from dpojax.connecting import connect
from dpojax.data.tokenize import Tokenizer, load_tokenizer
from dpojax.data.tokenizer_files import write_tokenizer
from dpojax.loading import load_model, load_reward_model, new_directory
from dpojax.model_card import make_card, make_short_card, with_card
from dpojax.models.adapter_config import (
    has_score,
    is_adapter,
    read_base_name,
    shape_by_targets,
)
from dpojax.models.decoder import Model, make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.functional import Params
from dpojax.models.huggingface import (
    read_generation_settings,
    read_settings,
    write_model,
)
from dpojax.models.lora import graft, merge_adapters, split_adapters
from dpojax.placing import Keeping
from dpojax.policy import write_trained
from dpojax.processes import decided_by_first
from dpojax.progress import say
from dpojax.run_directory import checkpoints_of
from dpojax.sharding import as_shardings, make_mesh


class _Exported(NamedTuple):
    """What is exported, but for the arrays that were trained."""

    model: Model
    trained: Params  # of a run only their shapes matter
    base: Params | None  # of adapters
    settings: dict[str, Any]
    generation_settings: dict[str, Any] | None
    base_name: str
    tokenizer: Tokenizer
    note: dict[str, Any] | None = None  # of a run's checkpoint


def export(config: ExportConfig) -> Path:
    """Writes a checkpoint of a run as a model's directory, or as one of adapters.

    Of a checkpoint only what was trained is read; the optimiser's state stays.

    Raises:
      ValueError: if there is nothing to export, or nothing to merge.
    """
    connect(config.distributed)
    output = Path(decided_by_first(lambda: str(new_directory(config.output))))
    source = Path(config.run)
    # Over all devices: what trained sharded need not fit on one of them.
    mesh = make_mesh(data=1, fsdp=-1)
    if is_adapter(source):
        if not config.merge or config.step is not None:
            raise ValueError(
                f"{source} holds adapters, not a run: it has no steps, and what can be "
                "exported is the model that they make with their base, by --merge."
            )
        exported, label = _read_adapted(source, str(source), mesh), str(source)
        step = 0
    elif (source / "model").is_dir():
        exported, step = _read_run(source, config.step, mesh)
        label = f"Step {step} of {source}"
    else:
        raise ValueError(f"{source} is not the directory of a run of dpojax train.")
    _write(output, exported, config, step)
    say(f"{label} is in {output}.")
    return output


def _write(output: Path, exported: _Exported, config: ExportConfig, step: int) -> None:
    model, trained, base, settings, generation_settings, base_name = exported[:6]
    is_adapter = model.lora is not None and not config.merge
    note = exported.note
    if note is None or "facts" not in note:  # adapters, or a run of an earlier version
        card = make_short_card(base_name, is_adapter=is_adapter)
    else:
        kinds = {"is_adapter": is_adapter, "is_reward": model.config.head == "score"}
        card = make_card(note, step, **kinds)
    write_rest = with_card(partial(write_tokenizer, exported.tokenizer), card)
    if not config.merge:
        write_trained(
            output,
            trained,
            model,
            settings,
            base_name,
            write_rest,
            generation_settings=generation_settings,
        )
        return
    if base is None or model.lora is None:
        raise ValueError(f"{config.run} trained all weights; leave out --merge.")
    # Compiled, so that kernels are merged where they are, each by its shards.
    merge = jax.jit(partial(merge_adapters, shape=model.lora))
    merged = merge(graft(base, trained))
    write_model(
        output,
        merged,
        settings,
        write_rest,
        generation_settings=generation_settings,
    )


def _read_run(source: Path, step: int | None, mesh: Mesh) -> tuple[_Exported, int]:
    """A run's checkpoint and its step."""
    step = int(decided_by_first(lambda: str(_choose_step(source, step))))
    checkpoints = Checkpoints(checkpoints_of(source), read_only=True)
    frame = source / "model"
    if is_adapter(frame):
        exported = _read_adapted(frame, read_base_name(frame), mesh)
    else:
        settings = read_settings(frame)
        model = make_model(as_decoder_config(settings))
        exported = _Exported(
            model,
            model.params,
            None,
            settings,
            read_generation_settings(frame),
            str(source),
            load_tokenizer(frame),
        )
    shardings = as_shardings(exported.trained, mesh)
    like = jax.tree.map(_abstract, exported.trained, shardings)
    trained = checkpoints.restore(step, {"params": like})["params"]
    note = checkpoints.note(step)
    checkpoints.close()
    return exported._replace(trained=trained, note=note), step


def _choose_step(source: Path, step: int | None) -> int:
    """The step that is asked for, or the newest; its checkpoint is whole."""
    checkpoints = checkpoints_of(source)
    if step is not None:
        check_whole(checkpoints, step)
        return step
    newest = find_newest(checkpoints)
    if newest.step is None:
        raise ValueError(f"{source} has no checkpoint yet.")
    if newest.damaged:
        say(f"Damaged checkpoints are passed over: {describe(newest.damaged)}.")
    return newest.step


def _read_adapted(directory: Path, name: str, mesh: Mesh) -> _Exported:
    """Adapters and their base; those of a run's frame are new ones of its shape."""
    load = load_reward_model if has_score(directory) else load_model
    new = None if name == str(directory) else partial(shape_by_targets, directory)
    keeping = Keeping(mesh, "float32", base_dtype="float32")
    loaded = load(name, keeping, new_adapters=new, seed=0)
    base, trained = split_adapters(loaded.params)
    tokenizer = loaded.tokenizer if new is None else load_tokenizer(directory)
    return _Exported(
        loaded.model,
        trained,
        base,
        loaded.settings,
        loaded.generation_settings,
        loaded.base,
        tokenizer,
    )


def _abstract(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
