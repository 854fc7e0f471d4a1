"""The card of a model: README.md, as the hub and people read it.

It is made of what a checkpoint notes of the run that made it. Names of files and models
are the user's: in the front matter YAML's own writer quotes them, and in the text they
stand in code, where Markdown does nothing with them. Paths lose their directories.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData

from dpojax.command_line import as_command, without_places
from dpojax.config import TrainConfig
from dpojax.losses.make import defaults_of, split_terms
from dpojax.losses.objective import Objective
from dpojax.losses.table import MIXTURES, OBJECTIVES
from dpojax.objective_table import SYMBOLS

# Papers that sources in the table of objectives name without their number.
_NUMBERS = {"Rafailov et al. 2023": "2305.18290", "Ouyang et al. 2022": "2203.02155"}

_KINDS = {"chosen": "preferred", "rejected": "other"}
_DEFINITIONS = {
    "loss": "the objective, mean over examples; terms per token, over tokens",
    "rewards/SIDE": "reward that the objective gives KIND completions",
    "rewards/margins": "difference of the two rewards",
    "rewards/accuracies": "share of pairs whose preferred completion has the higher "
    "reward; a tie counts one half",
    "rewards/length_correlation": "correlation of the margin with the difference of "
    "lengths",
    "rewards/rank_accuracies": "share of a list's pairs of unequal score that rewards "
    "order alike",
    "logps/SIDE": "log-probability of KIND completions, nats a completion",
    "logps/SIDE_per_token": "the same, nats a token",
    "lengths/SIDE": "length of KIND completions, tokens with EOS",
    "logratios/SIDE": "log-probability of KIND completions less that under the "
    "reference, nats a completion",
    "logratios/chosen_negative": "share of preferred completions that are less likely "
    "than under the reference",
    "kl": "KTO's z0, an estimate of KL(policy‖reference), nats",
    "entropy": "entropy of the next token, nats",
    "mean_token_accuracy": "share of tokens that are the most likely ones",
    "aux_loss": "load-balancing loss of the routers of experts",
    "samples/length": "length of sampled continuations, tokens with EOS",
    "samples/eos_rate": "share of these that end by EOS",
    "samples/kl": "KL(policy‖reference) along these, nats a sequence",
}

_UNITS = "Means ± standard errors over held-out examples; nats are natural logarithms."


def facts(
    config: TrainConfig,
    base: str,
    *,
    num_examples: Mapping[str, int],
    rates: np.ndarray,
) -> dict[str, Any]:
    """What a card tells of a run that its settings do not, as JSON can hold it.

    Args:
      config: the settings, on the machine where the run is.
      base: name of the model that it starts from or, with adapters, of their base.
      num_examples: by the part that they have in the run.
      rates: the learning rate of each step.
    """
    names = {base, config.model or base, *config.data}
    return {
        "base": base,
        # What was found and is no path was the hub's.
        "hub": sorted(name for name in names if not Path(name).exists()),
        "examples": dict(num_examples),
        "learning_rate": float(rates.max()),
    }


def make_card(
    note: Mapping[str, Any], step: int, *, is_adapter: bool, is_reward: bool
) -> str:
    """The text of the card of what a run trained.

    Args:
      note: what a checkpoint says of its run: see `dpojax.resume.make_note`; besides,
        `facts`, the newest evaluation, and the step of that.
      step: of the weights.
      is_adapter: whether it stands beside adapters.
      is_reward: whether the model gives rewards, no text.
    """
    settings, about = (without_places(note[key]) for key in ("configuration", "facts"))
    terms = _terms(settings["loss"]["name"])
    kind = "reward model" if is_reward else "causal language model"
    title = f"Adapters of a {kind}" if is_adapter else f"A {kind}"
    sections = {
        f"# {title}, trained with dpojax": [
            *_training(settings, about, step),
            *_reference(settings["reference"], terms),
        ],
        "## Objective": _objective(settings["loss"], terms),
        f"## Results after step {note['evaluated_at']}": _results(note["evaluation"]),
        "## Command": _fenced(as_command(settings), "bash"),
        "## Versions": [f"{note['code']}; {note['devices']}", "", *_versions(note)],
        "## Citation": _fenced("\n\n".join(_entries(terms)), "bibtex"),
    }
    front = _front(about, settings["data"], terms, is_adapter, is_reward)
    parts = ["\n".join([head, "", *lines]) for head, lines in sections.items() if lines]
    return "\n\n".join([f"---\n{front}\n---", *parts]) + "\n"


def make_short_card(base: str, *, is_adapter: bool) -> str:
    """The card of what no note tells about: adapters of others, merged, say."""
    front = ModelCardData(
        base_model=None if Path(base).exists() else base,
        library_name="peft" if is_adapter else "transformers",
        tags=["dpojax"],
    )
    about = f"- Base: {_code(without_places(base))}\n- Written by dpojax export"
    return f"---\n{front.to_yaml()}\n---\n\n# An exported model\n\n{about}\n"


def with_card(write: Callable[[Path], object], card: str) -> Callable[[Path], None]:
    """What writes into a model's directory, and then the card too."""

    def write_both(directory: Path) -> None:
        write(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")

    return write_both


def _front(
    about: Mapping[str, Any],
    data: Sequence[str],
    terms: Mapping[str, Objective | None],
    is_adapter: bool,
    is_reward: bool,
) -> str:
    """What the hub sorts models by, as YAML; what is not known is left out."""
    hub = about["hub"]
    return ModelCardData(
        base_model=about["base"] if about["base"] in hub else None,
        datasets=[name for name in data if name in hub] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if is_reward else "text-generation",
        tags=["dpojax", "jax", *(name for name, known in terms.items() if known)],
    ).to_yaml()


def _training(
    settings: Mapping[str, Any], about: Mapping[str, Any], step: int
) -> list[str]:
    optimizer = settings["optimizer"]
    examples = ", ".join(f"{n:,} {part}" for part, n in about["examples"].items())
    return [
        f"- Model: {_code(about['base'])}",
        f"- Data: {', '.join(map(_code, settings['data']))}; examples: {examples}; at "
        f"most {settings['max_length']:,} tokens of a prompt and one completion",
        f"- Step {step:,}, {settings['batch_size']:,} examples each",
        f"- Optimiser: {optimizer['name']}, learning rate {about['learning_rate']:.3g} "
        f"at most, {optimizer['schedule']}",
    ]


def _reference(
    name: str | None, terms: Mapping[str, Objective | None]
) -> Iterator[str]:
    """Of a loss that needs one."""
    if any(term is None or "reference" in term.needs for term in terms.values()):
        yield f"- Reference: {_code(name) if name else 'the policy at step 0'}"


def _terms(name: str) -> dict[str, Objective | None]:
    """The parts of a loss by their names; None: of the user's own file."""
    text = MIXTURES[name].terms if name in MIXTURES else name
    return {part: OBJECTIVES.get(part) for _, part in split_terms(text)}


def _objective(
    loss: Mapping[str, Any], terms: Mapping[str, Objective | None]
) -> list[str]:
    """The name as it was given, then each term with its settings and its source."""
    given = {k: v for k, v in loss.items() if k != "name" and v is not None}
    lines, taken = [_code(loss["name"]), ""], set()
    if loss["name"] in MIXTURES:
        lines[0] += f", which is {_code(MIXTURES[loss['name']].terms)}"
        given = dict(MIXTURES[loss["name"]].settings) | given
    for name, objective in terms.items():
        if objective is None:
            lines.append(f"- {_code(name)}: of the user's own file")
            continue
        known = defaults_of(objective)
        settings = known | {key: given[key] for key in known if key in given}
        taken |= settings.keys()
        told = [f"{_code(objective.formula)}", _listed(settings), objective.source]
        lines.append(f"- `{name}`: {'; '.join(filter(None, told))}")
    rest = {key: value for key, value in given.items() if key not in taken}
    lines += [f"- {_listed(rest)}"] if rest else []
    return [*lines, "", SYMBOLS]


def _results(evaluation: Mapping[str, float]) -> list[str]:
    """A table of the means, each with what it is."""
    rows = []
    for name, value in evaluation.items():
        if name.endswith("_se") or not math.isfinite(value):
            continue
        error = evaluation.get(f"{name}_se", math.nan)
        spread = f" ± {error:.2g}" if math.isfinite(error) else ""
        # Of a term of the user's own file the name is a path.
        term, slash, rest = name.partition("/")
        shown = _code(f"{term}{slash}{without_places(rest)}").replace("|", "\\|")
        rows.append(f"| {shown} | {value:.4g}{spread} | {definition(name)} |")
    if not rows:
        return []
    return ["| metric | value | what it is |", "| --- | --- | --- |", *rows, "", _UNITS]


def definition(name: str) -> str:
    """What a metric of an evaluation is; empty for one that is not known here."""
    if name.startswith("loss/"):
        return "this term of the objective, unweighted"
    if name in _DEFINITIONS:
        return _DEFINITIONS[name]
    for side, kind in _KINDS.items():
        general = re.sub(rf"/{side}\b|/{side}(?=_)", "/SIDE", name)
        if general in _DEFINITIONS:
            return _DEFINITIONS[general].replace("KIND", kind)
    return ""


def _versions(note: Mapping[str, Any]) -> list[str]:
    return [f"- {name} {version}" for name, version in note["versions"].items()]


def _entries(terms: Mapping[str, Objective | None]) -> Iterator[str]:
    """A BibTeX entry for each paper whose number is known."""
    sources = [term.source for term in terms.values() if term is not None]
    for source in dict.fromkeys(sources):
        number = re.search(r"arXiv:([\d.]+)", source)
        for work in re.findall(r"(\S+(?: et al\.)?) (\d{4})", source):
            author, year = work
            eprint = number[1] if number else _NUMBERS.get(f"{author} {year}")
            if eprint is not None:
                yield _entry(author, year, eprint)


def _entry(author: str, year: str, eprint: str) -> str:
    surname = author.removesuffix(" et al.")
    key = re.sub(r"\W", "", surname).lower()
    return (
        f"@misc{{{key}{year},\n  author = {{{surname} and others}},\n"
        f"  year = {{{year}}},\n  eprint = {{{eprint}}},\n"
        "  archivePrefix = {arXiv},\n}"
    )


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _code(text: str) -> str:
    """A code span, whatever backticks and line ends the text has."""
    line = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def _fenced(text: str, language: str) -> list[str]:
    """A block of code; nothing where there is none."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, 1 + longest)
    return [f"{fence}{language}", text, fence] if text else []
