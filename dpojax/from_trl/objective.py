"""What is optimised: TRL's losses as ours. Knows no data and no machine."""

from collections.abc import Mapping
from typing import Any

from dpojax.from_trl.part import Part, Refusal, names, number

_PAIRS = {  # DPOConfig.loss_type, and our name
    "sigmoid": "dpo",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "robust": "robust_dpo",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sft": "sft",
    "sigmoid_norm": "dpo_norm",
}
_SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}
_LOSS_FLAGS = ("--loss",)


def objective(trainer: str, values: Mapping[str, Any]) -> Part:
    """The loss with its settings, and what the reference is."""
    return {
        "dpo": _dpo,
        "kto": _kto,
        "cpo": _cpo,
        "simpo": _simpo,
        "orpo": _orpo,
        "sft": _sft,
        "reward": _reward,
    }[trainer](values)


def _dpo(values: Mapping[str, Any]) -> Part:
    types = names(values["loss_type"], "loss_type")
    unknown = [name for name in types if name not in _PAIRS]
    if unknown:
        return Part(refusals=(_no_loss(unknown[0], _PAIRS),))
    weights = values["loss_weights"] or [1.0] * len(types)
    if len(weights) != len(types):
        raise ValueError(
            f"loss_weights has {len(weights)} numbers for {len(types)} loss types."
        )
    terms = [(float(w), _PAIRS[t]) for w, t in zip(weights, types, strict=True)]
    if values["rpo_alpha"] is not None:
        terms.append((number(values, "rpo_alpha"), "sft"))
    loss: dict[str, Any] = {"name": _mixture(terms)}
    if set(types) != {"sft"}:
        loss["beta"] = number(values, "beta")
    notes = {}
    if _SMOOTHED.intersection(types):
        loss["label_smoothing"] = number(values, "label_smoothing")
    elif number(values, "label_smoothing"):
        notes["label_smoothing"] = (
            "not used: TRL since 0.29 ignores it for these losses; up to 0.28 sigmoid "
            "took it, which is --loss.label-smoothing here"
        )
    if "discopop" in types:
        loss["tau"] = number(values, "discopop_tau")
    if values["f_divergence_type"] not in ("reverse_kl", "FDivergenceType.REVERSE_KL"):
        loss["divergence"] = values["f_divergence_type"]
        if values["f_divergence_type"] == "alpha_divergence":
            loss["divergence_alpha"] = number(values, "f_alpha_divergence_coef")
    if values["ld_alpha"] is not None:
        loss["ld_alpha"] = number(values, "ld_alpha")
    if values["use_weighting"]:
        loss["weighting"] = "aligned"
    return _with_reference(values, loss, notes)


def _kto(values: Mapping[str, Any]) -> Part:
    known = ("kto", "apo_zero_unpaired")
    if values["loss_type"] not in known:
        return Part(refusals=(_no_loss(values["loss_type"], known),))
    loss = {"name": values["loss_type"], "beta": number(values, "beta")}
    if values["loss_type"] == "kto":
        loss |= {
            name: number(values, name)
            for name in ("desirable_weight", "undesirable_weight")
        }
    notes = {
        "loss_type": "loss.name; z0 is the mean over an optimiser step's batch, in "
        "TRL over each microbatch"
    }
    return _with_reference(values, loss, notes if loss["name"] == "kto" else {})


def _with_reference(
    values: Mapping[str, Any], loss: dict[str, Any], notes: dict[str, str]
) -> Part:
    settings: dict[str, Any] = {"loss": loss}
    if values["precompute_ref_log_probs"]:
        settings["reference"] = "precomputed"
    if values["sync_ref_model"]:
        settings["moving"] = {
            "kind": "tr_dpo",
            "every": int(number(values, "ref_model_sync_steps")),
            "alpha": number(values, "ref_model_mixup_alpha"),
        }
    return Part(settings, notes)


def _cpo(values: Mapping[str, Any]) -> Part:
    kind, weight = values["loss_type"], number(values, "cpo_alpha")
    beta, alpha = number(values, "beta"), number(values, "alpha")
    smoothing = number(values, "label_smoothing")
    known = ("sigmoid", "simpo", "alphapo")
    if kind not in known:
        return Part(refusals=(_no_loss(kind, known),))
    if kind == "sigmoid" and not alpha:
        loss = {"name": "cpo", "alpha": weight, "label_smoothing": smoothing}
        return Part({"loss": loss | {"beta": beta}})
    if kind == "alphapo" or (kind == "simpo" and not weight):
        name = "alphapo" if alpha else "simpo"
        loss = {"name": name, "gamma_beta_ratio": number(values, "simpo_gamma") / beta}
        loss |= {"alpha": alpha} if alpha else {"label_smoothing": smoothing}
        refusals = _unsmoothed(smoothing) if alpha else ()
        notes = {"simpo_gamma": "loss.gamma_beta_ratio, which is it over beta"}
        return Part({"loss": loss | {"beta": beta}}, notes, refusals)
    if kind == "simpo" and not alpha:
        loss = {"name": "cpo_simpo", "alpha": weight, "beta": beta}
        loss["gamma_beta_ratio"] = number(values, "simpo_gamma") / beta
        notes = {"simpo_gamma": "loss.gamma_beta_ratio, which is it over beta"}
        return Part({"loss": loss}, notes, _unsmoothed(smoothing))
    sentence = f"alpha {alpha} together with loss_type {kind} is no loss of dpojax"
    return Part(refusals=(Refusal("alpha", sentence, _LOSS_FLAGS),))


def _simpo(values: Mapping[str, Any]) -> Part:
    if values["loss_type"] != "sigmoid":
        return Part(refusals=(_no_loss(values["loss_type"], ("sigmoid",)),))
    weight = number(values, "sft_weight")
    loss = {
        "name": f"simpo+{weight:g}*sft" if weight else "simpo",
        "beta": number(values, "beta"),
        "gamma_beta_ratio": number(values, "gamma_beta_ratio"),
        "label_smoothing": number(values, "label_smoothing"),
    }
    return Part({"loss": loss})


def _orpo(values: Mapping[str, Any]) -> Part:
    note = (
        "loss.beta; the NLL is that of the completion, in TRL of prompt and completion"
    )
    return Part(
        {"loss": {"name": "orpo", "beta": number(values, "beta")}}, {"beta": note}
    )


def _sft(values: Mapping[str, Any]) -> Part:
    settings: dict[str, Any] = {"loss": {"name": "sft"}}
    if values["assistant_only_loss"]:
        settings["turns"] = "assistant"
    refusals = []
    if values["loss_type"] not in ("nll", "chunked_nll"):
        refusals.append(_no_loss(values["loss_type"], ("nll", "chunked_nll")))
    if values["completion_only_loss"] is False:
        refusals.append(
            Refusal("completion_only_loss", "prompts are never scored by dpojax")
        )
    if values["packing"] and values["packing_strategy"] == "wrapped":
        refusals.append(
            Refusal("packing_strategy", "dpojax cuts no example in two to fill rows")
        )
    return Part(settings, refusals=tuple(refusals))


def _reward(values: Mapping[str, Any]) -> Part:
    loss: dict[str, Any] = {"name": "bradley_terry"}
    if values["center_rewards_coefficient"] is not None:
        loss["center"] = number(values, "center_rewards_coefficient")
    return Part({"loss": loss, "too_long": "drop"})


def _mixture(terms: list[tuple[float, str]]) -> str:
    return "+".join(name if w == 1 else f"{w:g}*{name}" for w, name in terms)


def _no_loss(name: Any, known: Any) -> Refusal:
    sentence = f"{name!r} is no loss that has a counterpart; {', '.join(known)} have"
    return Refusal("loss_type", sentence, _LOSS_FLAGS)


def _unsmoothed(smoothing: float) -> tuple[Refusal, ...]:
    if not smoothing:
        return ()
    return (Refusal("label_smoothing", "this loss has none in dpojax", _LOSS_FLAGS),)
