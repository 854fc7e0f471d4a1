"""Steps of TRL's DPOTrainer on a prepared directory, timed; needs torch and trl alone.

`compare.py` runs it with the interpreter that it is given. Pairs are taken in the order
of ``batches.jsonl``, their token ids as they are.
"""

import argparse
import json
import resource
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peer_inputs import count, host_peak, read, reset_host_peak
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer


class Clock(transformers.TrainerCallback):
    """The times at which training began and each step ended."""

    def __init__(self, num_unmeasured: int):
        self.num_unmeasured, self.times = num_unmeasured, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self.times.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stops it for a step."""
        self.times.append(time.perf_counter())
        if state.global_step == self.num_unmeasured:
            reset_host_peak()


class Trainer(DPOTrainer):
    """Takes token ids as they are, and keeps every loss."""

    losses: list[torch.Tensor] = []

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Remembers the loss where it is computed, and does not wait for it."""
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


def main() -> None:
    """Trains and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--unmeasured-steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precompute", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lora-rank", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        figures = train(arguments, scratch)
    arguments.output.write_text(json.dumps(figures))


def train(arguments: argparse.Namespace, scratch: str) -> dict[str, Any]:
    num_steps = arguments.steps + arguments.unmeasured_steps
    rows = read(arguments.directory / "batches.jsonl", num_steps * arguments.batch_size)
    clock = Clock(arguments.unmeasured_steps)
    adapters = None
    if arguments.lora_rank is not None:
        import peft

        adapters = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.lora_rank,
            lora_alpha=32,
            target_modules="all-linear",
        )
    trainer = Trainer(
        model=str(arguments.directory / "model"),
        args=settings(arguments, num_steps, scratch),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(
            arguments.directory / "model"
        ),
        peft_config=adapters,
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    seconds = [after - before for before, after in pairwise(clock.times)]
    return {
        "library": f"trl {version('trl')}, torch {torch.__version__}",
        "seconds": seconds[arguments.unmeasured_steps :],
        "sequence_tokens": count(rows, arguments.batch_size)[
            arguments.unmeasured_steps :
        ],
        "first_step_seconds": seconds[0],
        "losses": [float(loss) for loss in trainer.losses],
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "measured_host_peak_bytes": host_peak(),
        "device_peak_bytes": torch.cuda.max_memory_allocated()
        if arguments.device == "cuda"
        else None,
    }


def settings(arguments: argparse.Namespace, num_steps: int, scratch: str) -> DPOConfig:
    return DPOConfig(
        output_dir=scratch,
        max_steps=num_steps,
        per_device_train_batch_size=arguments.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_length=None,
        bf16=arguments.dtype == "bfloat16",
        gradient_checkpointing=arguments.gradient_checkpointing,
        precompute_ref_log_probs=arguments.precompute,
        model_init_kwargs={
            "dtype": torch.float32,
            "attn_implementation": arguments.attention,
        },
        use_cpu=arguments.device == "cpu",
        dataloader_pin_memory=arguments.device == "cuda",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
