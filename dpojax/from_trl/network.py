"""What is trained: the model, its adapters, its precision and its lengths."""

from collections.abc import Mapping
from typing import Any

from dpojax.from_trl.part import Part, Refusal, names, number, whole


def network(trainer: str, values: Mapping[str, Any]) -> Part:
    """The model and how it computes."""
    settings: dict[str, Any] = {}
    refusals = []
    if values["model_name_or_path"] is not None:
        settings["model"] = str(values["model_name_or_path"])
    if values["fp16"]:
        sentence = "dpojax computes in bfloat16 or float32"
        refusals.append(Refusal("fp16", sentence, ("--compute-dtype",)))
    else:
        half = values["bf16"] is not False
        settings["compute_dtype"] = "bfloat16" if half else "float32"
    length = values["max_length"]
    key = "max_length"
    if values["max_seq_length"] is not None:
        key, length = "max_seq_length", values["max_seq_length"]
    if length is None:
        sentence = "without a limit: dpojax needs one"
        refusals.append(Refusal(key, sentence, ("--max-length",)))
    else:
        settings["max_length"] = whole({key: length}, key)
    adapters = _adapters(trainer, values) if values["use_peft"] else Part()
    return Part(
        {**settings, **adapters.settings},
        adapters.notes,
        (*refusals, *adapters.refusals),
    )


def _adapters(trainer: str, values: Mapping[str, Any]) -> Part:
    lora: dict[str, Any] = {
        "rank": whole(values, "lora_r"),
        "alpha": number(values, "lora_alpha"),
    }
    refusals, notes = [], {}
    targets = values["lora_target_modules"]
    if targets is None:
        sentence = (
            "PEFT chooses by the model's kind where a recipe names none: name them"
        )
        refusals.append(Refusal("lora_target_modules", sentence, ("--lora.targets",)))
    else:
        lora["targets"] = names(targets, "lora_target_modules")
    if trainer == "sft" or not values["disable_dropout"]:
        lora["dropout"] = number(values, "lora_dropout")
    elif number(values, "lora_dropout"):
        notes["lora_dropout"] = "not used: TRL's disable_dropout turns it off too"
    if values["use_rslora"]:
        lora["scaling"] = "rslora"
    if values["use_dora"]:
        lora["kind"] = "dora"
    if values["load_in_4bit"]:
        lora["base"] = "nf4"
        if values["bnb_4bit_quant_type"] != "nf4":
            sentence = f"{values['bnb_4bit_quant_type']}: dpojax has nf4"
            refusals.append(Refusal("bnb_4bit_quant_type", sentence, ("--lora.base",)))
    elif values["load_in_8bit"]:
        lora["base"] = "int8"
    return Part({"lora": lora}, notes, tuple(refusals))
