"""How a run goes: batches, length, optimiser, evaluations, checkpoints."""

from collections.abc import Collection, Mapping
from typing import Any, get_args

from dpojax.config import TrackerName
from dpojax.from_trl.part import Part, Refusal, names, number, whole

_OPTIMIZERS = {  # TRL's name: ours, and how moments are kept
    "adamw_torch": ("adamw", "float32"),
    "adamw_torch_fused": ("adamw", "float32"),
    "adamw_hf": ("adamw", "float32"),
    "adamw_apex_fused": ("adamw", "float32"),
    "paged_adamw": ("adamw", "float32"),
    "paged_adamw_32bit": ("adamw", "float32"),
    "adamw_bnb_8bit": ("adamw", "int8"),
    "adamw_8bit": ("adamw", "int8"),
    "paged_adamw_8bit": ("adamw", "int8"),
    "rmsprop": ("rmsprop", "float32"),
    "adafactor": ("adafactor", "float32"),
}
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}


def batches(
    values: Mapping[str, Any], processes: int | None, settled: Collection[str]
) -> Part:
    """The global batch, which in TRL is per device, times accumulation and processes.

    The length of the run is left to the flag that is given for it, if one is.
    """
    each = whole(values, "per_device_train_batch_size")
    parts = whole(values, "gradient_accumulation_steps")
    length: dict[str, float] = {}
    if "--steps" not in settled and "--epochs" not in settled:
        steps = whole(values, "max_steps")
        epochs = number(values, "num_train_epochs")
        length = {"steps": steps} if steps > 0 else {"epochs": epochs}
    settings: dict[str, Any] = {"microbatches": parts, **length}
    if processes is None:
        sentence = (
            f"{each} examples per device and {parts} accumulation steps are "
            f"{each * parts} for each process, and a recipe does not say how many of "
            f"them TRL runs: give --trl-processes, or --batch-size"
        )
        refused = Refusal("per_device_train_batch_size", sentence, ("--batch-size",))
        return Part(settings, refusals=(refused,))
    if processes < 1:
        raise ValueError(f"--trl-processes is {processes}; it must be positive.")
    return Part({"batch_size": each * parts * processes, **settings})


def optimizer(values: Mapping[str, Any]) -> Part:
    """The optimiser and its schedule."""
    name, schedule = str(values["optim"]), str(values["lr_scheduler_type"])
    refusals, notes = [], {}
    settings: dict[str, Any] = {
        "learning_rate": number(values, "learning_rate"),
        "max_grad_norm": number(values, "max_grad_norm"),
        "warmup_steps": _warmup(values, schedule),
    }
    if schedule in _SCHEDULES:
        settings["schedule"] = _SCHEDULES[schedule]
    else:
        sentence = (
            f"{schedule}: dpojax has {', '.join(dict.fromkeys(_SCHEDULES.values()))}"
        )
        flags = ("--optimizer.schedule",)
        refusals.append(Refusal("lr_scheduler_type", sentence, flags))
    if name not in _OPTIMIZERS:
        sentence = f"{name}: counterparts have {', '.join(_OPTIMIZERS)}"
        refusals.append(Refusal("optim", sentence, ("--optimizer.name",)))
    else:
        settings |= _rule(name, values)
        if settings["name"] == "adamw" and settings["moments"] == "int8":
            notes["optim"] = (
                "optimizer.name and optimizer.moments: int8 as here, whose blocks and "
                "code book differ from bitsandbytes'"
            )
        if settings["name"] != "adamw" and number(values, "weight_decay"):
            refusals.append(
                Refusal(
                    "weight_decay", f"dpojax's {name} has none", ("--optimizer.name",)
                )
            )
    return Part({"optimizer": settings}, notes, tuple(refusals))


def _rule(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    ours, moments = _OPTIMIZERS[name]
    if ours != "adamw":
        return {"name": ours}
    return {
        "name": ours,
        "moments": moments,
        "weight_decay": number(values, "weight_decay"),
        "beta1": number(values, "adam_beta1"),
        "beta2": number(values, "adam_beta2"),
        "epsilon": number(values, "adam_epsilon"),
    }


def _warmup(values: Mapping[str, Any], schedule: str) -> float:
    if schedule == "constant":  # in transformers without warm-up, whatever is said
        return 0
    steps, share = number(values, "warmup_steps"), number(values, "warmup_ratio")
    return steps if steps else share  # transformers: steps win where both are given


def trackers(values: Mapping[str, Any]) -> Part:
    """Where metrics go besides the run's directory."""
    asked = names(values["report_to"], "report_to")
    ours = get_args(TrackerName)
    taken = tuple(name for name in asked if name in ours)
    others = [name for name in asked if name not in (*ours, "none")]
    if not others:
        return Part({"track": taken})
    note = f"track, but not {', '.join(others)}: dpojax has {', '.join(ours)}"
    return Part({"track": taken}, {"report_to": note})


def occasions(values: Mapping[str, Any]) -> Part:
    """When something is logged, evaluated or saved."""
    settings: dict[str, Any] = {"seed": whole(values, "seed")}
    notes = {}
    logging = number(values, "logging_steps")
    if logging >= 1:
        settings["log_every"] = int(logging)
    else:
        notes["logging_steps"] = "not used: a share of the run; see --log-every"
    strategy = values["eval_strategy"]
    steps = values["eval_steps"]
    if strategy == "steps" and (steps is None or number(values, "eval_steps") >= 1):
        settings["evaluate_every"] = (
            int(logging if steps is None else float(steps)) or 1
        )
    elif strategy is False or strategy == "no":
        notes["eval_strategy"] = (
            "not used: dpojax holds out a test split and evaluates before the first "
            "step and at the end at least; see --test-size and --evaluate-every"
        )
    else:
        notes["eval_strategy"] = (
            "not used: given in epochs or shares; see --evaluate-every"
        )
    saving = number(values, "save_steps")
    if values["save_strategy"] == "steps" and saving >= 1:
        settings["save_every"] = int(saving)
    else:
        notes["save_strategy"] = (
            "not used: there is a checkpoint at the end at least; see "
        )
        notes["save_strategy"] += "--save-every"
    if values["save_total_limit"] is not None:
        settings["keep_last"] = whole(values, "save_total_limit")
    if values["output_dir"] is not None:
        settings["output"] = str(values["output_dir"])
    return Part(settings, notes)
