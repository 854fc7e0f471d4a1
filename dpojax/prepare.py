"""What settings name: the loss, adapters, the optimiser; and whether they can work.

This file knows neither the loop nor the model, and reads no data.
"""

import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import optax

from dpojax.config import (
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from dpojax.loading import NewAdapters
from dpojax.losses.make import Loss, make_loss, split_terms
from dpojax.losses.objective import Objective
from dpojax.losses.table import OBJECTIVES
from dpojax.measure import check_token_metrics
from dpojax.models.adapter_modules import as_last_layers, choose_modules
from dpojax.models.lora import LoraShape
from dpojax.optimizer import make_optimizer, make_schedule
from dpojax.precision import LARGEST_FLOAT
from dpojax.reference import Params
from dpojax.reference_setting import check_reference
from dpojax.user_code import load_names


def make_configured_loss(config: LossConfig) -> Loss:
    """The loss that settings name, the user's own included.

    Raises:
      ValueError: for a name or setting that there is not, naming the nearest.
    """
    settings = {
        name: value
        for name, value in vars(config).items()
        if name != "name" and value is not None
    }
    own = {
        name: _load_objective(name)
        for _, name in split_terms(config.name)
        if ":" in name
    }
    return make_loss(config.name, OBJECTIVES | own, **settings)


def is_logistic(config: LossConfig) -> bool:
    """Whether the loss of a pair is minus a log-sigmoid, and nothing else."""
    plain = not config.label_smoothing and config.weighting is None
    return config.name in ("dpo", "simpo") and plain


def check_training(config: TrainConfig, loss: Loss) -> None:
    """Refuses settings that cannot work, whatever the model and data.

    Raises:
      ValueError: naming the setting, its value and what is allowed.
    """
    if config.model is None or not config.data:
        missing = "--model" if config.model is None else "--data"
        raise ValueError(f"Training needs a model and data; {missing} is missing.")
    check_settings(config, loss)


def check_settings(config: TrainConfig, loss: Loss) -> None:
    """The same, wherever the model and data come from."""
    _check_numbers(config)
    check_reference(config, loss)
    check_token_metrics(config.token_metrics, loss.needs)
    if config.batch_size == 1 and "mismatched" in loss.needs:
        raise ValueError(
            f"The loss {loss.name!r} compares each example with another of its batch; "
            "batch_size must be at least 2."
        )
    if config.epochs is not None and config.steps is not None:
        raise ValueError("Give the length of the run by --epochs or --steps, not both.")
    positive = ("batch_size", "microbatches", "chunk_size", "log_every",
                "evaluate_every", "save_every", "keep_last")  # fmt: skip
    optional = ("epochs", "steps", "stop_after", "max_examples", "row_length")
    settings = vars(config)
    for name in positive + optional:
        if settings[name] is not None and settings[name] <= 0:
            raise ValueError(f"{name} is {settings[name]}; it must be positive.")
    if config.seed < 0:
        raise ValueError(f"seed is {config.seed}; it must not be negative.")
    if config.epochs is not None and not math.isfinite(config.epochs):
        raise ValueError(f"epochs is {config.epochs}; it must be a finite number.")
    if config.sample_prompts < 0 or config.sample_tokens < 1:
        raise ValueError(
            f"{config.sample_tokens} tokens of {config.sample_prompts} prompts cannot "
            "be sampled; neither may be negative, and at least one token is needed."
        )


# A seed may be a time; positions of a row stand in memory, all of them.
_LARGEST: dict[str, int] = {"seed": 1 << 63, "row_length": 1 << 24}


def _check_numbers(config: object, within: str = "") -> None:
    """Refuses what is infinite or no number, and what no array could be as large as."""
    for name, value in vars(config).items():
        if is_dataclass(value):
            _check_numbers(value, f"{within}{name}.")
        elif isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
            raise ValueError(f"{within}{name} is {value}; it must be a finite number.")
        elif isinstance(value, int) and abs(value) >= _LARGEST.get(name, 1 << 31):
            raise ValueError(
                f"{within}{name} is {value}; it must be smaller than "
                f"{_LARGEST.get(name, 1 << 31):,}."
            )


def make_new_adapters(config: LoraConfig) -> NewAdapters | None:
    """What decides the adapters of a model from its shapes; None if it gets none.

    Raises:
      ValueError: for a rank, alpha or dropout that cannot be, or a setting of new
        adapters without a rank.
    """
    if not 0 <= config.dropout < 1:
        raise ValueError(f"lora.dropout is {config.dropout}; it must be in [0, 1).")
    if config.rank is None:
        names = ("alpha", "targets", "layers", "kind", "scaling")
        given = [name for name in names if vars(config)[name] not in (None, ())]
        if given:
            raise ValueError(
                f"--lora.{given[0]} describes new adapters; it needs --lora.rank too."
            )
        return None
    alpha = 32.0 if config.alpha is None else config.alpha
    if config.rank < 1 or alpha <= 0:
        raise ValueError(
            f"lora.rank is {config.rank} and lora.alpha {alpha:g}; both must be "
            "positive."
        )

    def new_adapters(base: Params, settings: Mapping[str, Any]) -> LoraShape:
        assert config.rank is not None
        targets = config.targets or ("all-linear",)
        return LoraShape(
            modules=choose_modules(targets, base, settings),
            rank=config.rank,
            alpha=alpha,
            kind=config.kind or "lora",
            scaling=config.scaling or "standard",
            layers=as_last_layers(config.layers, base),
        )

    return new_adapters


def largest_learning_rate(config: OptimizerConfig, default_rate: float) -> float:
    """That of the settings; where they have none, the default."""
    return default_rate if config.learning_rate is None else config.learning_rate


def configured_schedule(
    config: OptimizerConfig, default_rate: float, num_steps: int
) -> optax.Schedule:
    """The learning rate at each step of a run."""
    warmup = config.warmup_steps
    return make_schedule(
        config.schedule,
        learning_rate=largest_learning_rate(config, default_rate),
        num_steps=num_steps,
        warmup_steps=math.ceil(warmup * num_steps if warmup < 1 else warmup),
    )


def configured_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The optimiser that settings name."""
    return make_optimizer(
        config.name,
        schedule,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=config.epsilon,
        moments=config.moments,
    )


def _load_objective(name: str) -> Objective:
    """A row of the table from ``file.py:name``; a bare function is a loss of pairs."""
    path, _, key = name.rpartition(":")
    names = load_names(Path(path), "loss")
    value = names.get(key)
    if isinstance(value, Objective):
        return value
    if not isinstance(value, FunctionType):
        others = [
            other
            for other, thing in names.items()
            if isinstance(thing, Objective | FunctionType)
        ]
        raise ValueError(
            f"{path} has no loss {key!r}; it has {', '.join(others) or 'none'}."
        )
    return Objective(value, "", path)
