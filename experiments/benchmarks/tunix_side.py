"""Steps of Tunix's DPOTrainer on a prepared directory, timed; needs google-tunix alone.

`compare.py` runs it with the interpreter that it is given (Python 3.12). Tunix takes
prompts padded on the left and completions padded on the right; here to the longest of
the data, so that one program serves every batch. A step's time is that between two
batches that its loop asks for.
"""

import argparse
import importlib
import importlib.metadata
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peer_inputs import count, host_peak, read, reset_host_peak

# By name: where this project is checked, Tunix need not be installed.
dpo = importlib.import_module("tunix.sft.dpo.dpo_trainer")
llama = importlib.import_module("tunix.models.llama3.model")
weights = importlib.import_module("tunix.models.llama3.params")


class Trainer(dpo.DPOTrainer):
    """Keeps every loss."""

    losses: list[float] = []

    def _log_metrics(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        self.losses.append(float(loss))
        super()._log_metrics(loss, *args, **kwargs)


def main() -> None:
    """Trains and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--unmeasured-steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--remat", choices=["none", "block", "decoder"], default="none")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    arguments.output.write_text(json.dumps(train(arguments)))


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    skipped, size = arguments.unmeasured_steps, arguments.batch_size
    rows = read(
        arguments.directory / "batches.jsonl", (arguments.steps + skipped) * size
    )
    times: list[float] = []

    def timed(batches: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number == skipped:
                reset_host_peak()
            times.append(time.perf_counter())
            yield batch

    policy, reference = (load(arguments) for _ in range(2))
    trainer = Trainer(
        model=policy,
        ref_model=reference,
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(arguments.learning_rate, weight_decay=0.0),
        ),
        training_config=dpo.DPOTrainingConfig(
            beta=0.1, eval_every_n_steps=10**9, max_inflight_computations=1
        ),
    )
    trainer.train(timed(make_batches(rows, size)))
    times.append(time.perf_counter())
    seconds = np.diff(times).tolist()
    return {
        "library": f"google-tunix {importlib.metadata.version('google-tunix')}, "
        f"jax {jax.__version__}",
        "seconds": seconds[skipped:],
        "sequence_tokens": count(rows, size)[skipped:],
        "first_step_seconds": seconds[0],
        "losses": trainer.losses,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "measured_host_peak_bytes": host_peak(),
        "device_peak_bytes": (jax.devices()[0].memory_stats() or {}).get(
            "peak_bytes_in_use"
        ),
    }


def load(arguments: argparse.Namespace) -> Any:
    """A model of the prepared weights."""
    directory = arguments.directory / "model"
    settings = json.loads((directory / "config.json").read_text())
    assert settings["model_type"] == "llama", "this script knows Llamas alone"
    heads = settings["num_attention_heads"]
    config = llama.ModelConfig(
        num_layers=settings["num_hidden_layers"],
        vocab_size=settings["vocab_size"],
        embed_dim=settings["hidden_size"],
        hidden_dim=settings["intermediate_size"],
        num_heads=heads,
        head_dim=settings["hidden_size"] // heads,
        num_kv_heads=settings.get("num_key_value_heads", heads),
        rope_theta=settings["rope_theta"],
        norm_eps=settings["rms_norm_eps"],
        weight_tying=settings.get("tie_word_embeddings", False),
        remat_config=llama.RematConfig[arguments.remat.upper()],
    )
    return weights.create_model_from_safe_tensors(
        str(directory), config, dtype=jnp.dtype(arguments.dtype)
    )


def make_batches(rows: list[dict[str, list[int]]], batch_size: int) -> Iterator[Any]:
    """The pairs in order, each part padded to the longest of all."""
    columns = {}
    for name, left in (("prompt", True), ("chosen", False), ("rejected", False)):
        parts = [row[f"{name}_ids"] for row in rows]
        columns[name] = parts, left, max(map(len, parts))
    longest = max(columns[name][2] for name in ("chosen", "rejected"))
    for start in range(0, len(rows), batch_size):
        batch = {}
        for name, (parts, left, length) in columns.items():
            padded = length if name == "prompt" else longest
            ids, mask = pad(parts[start : start + batch_size], padded, left)
            batch |= {f"{name}_ids": ids, f"{name}_mask": mask}
        yield dpo.TrainingInput(**batch)


def pad(
    parts: list[list[int]], length: int, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(parts), length), np.int32)
    mask = np.zeros(ids.shape, np.int32)
    for row, tokens in enumerate(parts):
        where = slice(length - len(tokens), None) if left else slice(len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
    return ids, mask


if __name__ == "__main__":
    main()
