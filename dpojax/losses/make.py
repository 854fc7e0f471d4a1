"""From the name of a loss and its settings to a function of `Scores`.

A name may be a weighted sum, ``0.8*dpo+0.2*bco_pair+sft``. Settings are checked here,
before anything is loaded. Nothing here knows a model or a batch layout.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.losses.limits import check_setting
from dpojax.losses.modifiers import desensitize, f_divergence, pair_weight
from dpojax.losses.objective import Kind, Need, Objective
from dpojax.losses.scores import Outcome, Scores
from dpojax.losses.table import MIXTURES, OBJECTIVES

Setting = float | bool | str
# Settings that change what a loss of pairs sees, whether or not it has them itself.
MODIFIERS = ("divergence", "divergence_alpha", "ld_alpha", "weighting")


class Term(NamedTuple):
    """One part of a loss, its settings bound."""

    name: str
    weight: float
    objective: Objective
    settings: Mapping[str, Setting]  # of the function
    modifiers: Mapping[str, Setting]

    @property
    def needs(self) -> frozenset[Need]:
        """What it asks for, its modifiers included."""
        needs = set(self.objective.needs)
        weighting = {**self.settings, **self.modifiers}.get("weighting")
        if "ld_alpha" in self.modifiers:
            needs.add("prefix")
        if self.settings.get("margin_scale"):
            needs.add("score")
        if weighting == "aligned":
            needs.add("log_sum_squares")
        elif weighting == "likelihood":
            needs.discard("log_sum_squares")
        return frozenset(needs)

    def evaluate(self, scores: tuple[Scores, ...], running: Any) -> Outcome:
        """The loss of each example, unweighted."""
        function = partial(self.objective.function, **self.settings)
        more = () if self.objective.running is None else (running,)
        seen, modifiers = scores, dict(self.modifiers)
        if "ld_alpha" in modifiers:
            ld_alpha = float(modifiers["ld_alpha"])
            seen = tuple(desensitize(one, ld_alpha=ld_alpha) for one in seen)
        outcome = function(*seen, *more)
        if "divergence" in modifiers:
            of = {name: modifiers[name] for name in MODIFIERS[:2] if name in modifiers}
            change: Callable[..., Scores] = partial(f_divergence, **of)
            # The rewards stay those of the reverse KL, as TRL's.
            loss = function(*map(change, seen), *more).loss
            outcome = outcome._replace(loss=loss)
        if "weighting" in modifiers:
            weigh: Callable[..., Any] = pair_weight
            weight = weigh(*scores, weighting=modifiers["weighting"])
            outcome = outcome._replace(loss=weight * outcome.loss)
        return outcome


class Loss(NamedTuple):
    """A weighted sum of objectives, as a function of numbers."""

    name: str
    terms: tuple[Term, ...]

    @property
    def kind(self) -> Kind:
        """What an example must be."""
        return _kinds(self.terms)[0]

    @property
    def needs(self) -> frozenset[Need]:
        """What any of the terms asks for."""
        return frozenset().union(*(term.needs for term in self.terms))

    @property
    def learning_rate(self) -> float:
        """The default for full fine-tuning: the first term's."""
        return self.terms[0].objective.learning_rate

    @property
    def batchwise(self) -> bool:
        """Whether an example's loss depends on the others of its batch."""
        return any(term.objective.batchwise for term in self.terms)

    def initial_running(self) -> dict[str, Any]:
        """The statistics, by term, before the first step."""
        return {
            term.name: term.objective.running.initial()
            for term in self.terms
            if term.objective.running is not None
        }

    def update_running(
        self, running: Mapping[str, Any], candidates: Scores
    ) -> dict[str, Any]:
        """The statistics after a batch was seen; `candidates` as in a call."""
        updated = {}
        for term in self.terms:
            if term.objective.running is not None:
                update = term.objective.running.update
                known = _keywords(update)
                used = {k: v for k, v in term.settings.items() if k in known}
                scores = _arguments(term, candidates)
                updated[term.name] = update(running[term.name], *scores, **used)
        return updated

    def __call__(
        self, candidates: Scores, running: Mapping[str, Any]
    ) -> dict[str, Outcome]:
        """The outcome of each term, unweighted, by its name.

        Args:
          candidates: the completions of each example, ``[*batch, completions]``.
          running: the statistics of the terms that have any.
        """
        return {
            term.name: term.evaluate(
                _arguments(term, candidates), running.get(term.name)
            )
            for term in self.terms
        }

    def total(
        self, outcomes: Mapping[str, Outcome]
    ) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"] | None]:
        """The weighted sums of the terms' losses, and of their token losses if any."""
        examples = sum(term.weight * outcomes[term.name].loss for term in self.terms)
        parts = [(term.weight, outcomes[term.name].token_loss) for term in self.terms]
        some = [weight * part for weight, part in parts if part is not None]
        return jnp.asarray(examples), jnp.asarray(sum(some)) if some else None


def make_loss(
    name: str,
    objectives: Mapping[str, Objective] = OBJECTIVES,
    /,
    **settings: Setting,
) -> Loss:
    """The loss called `name`, with its settings bound.

    Args:
      name: a key of the table, the name of a mixture, or a weighted sum of keys, as
        ``0.8*dpo+0.2*bco_pair+sft``.
      objectives: the table.
      **settings: keyword arguments of the losses, each given to every term that has
        it; or modifiers of pairs: ``divergence`` and ``divergence_alpha``, which all
        terms with a reference must allow, ``ld_alpha``, ``weighting``. What is not
        given keeps its default.

    Raises:
      ValueError: for an unknown name, terms of different kinds, or a setting that no
        term has or whose value is not allowed.
    """
    text, defaults = name, {}
    if name in MIXTURES:
        text, defaults = MIXTURES[name].terms, MIXTURES[name].settings
    parts = split_terms(text)
    for _, part in parts:
        if part not in objectives:
            raise ValueError(_unknown(part, objectives))
    settings = dict(defaults) | settings
    terms = tuple(
        _make_term(part, weight, objectives[part], settings) for weight, part in parts
    )
    if len({"reward_head" in term.objective.needs for term in terms}) > 1:
        raise ValueError(
            f"The terms of {text!r} must all take rewards of a scalar head or all "
            "log-probabilities; train a reward model by itself."
        )
    kinds = _kinds(terms)
    if len(kinds) > 1 or len({term.name for term in terms}) < len(terms):
        raise ValueError(
            f"The terms of {text!r} must differ and take examples of one kind, and "
            f"they take {' and '.join(kinds)}; only sft joins losses of pairs."
        )
    for setting in settings:
        if not any(setting in {**term.settings, **term.modifiers} for term in terms):
            raise ValueError(_no_effect(setting, name, terms))
    if "divergence" in settings:
        _check_divergence(terms)
    return Loss(name, terms)


def split_terms(text: str) -> list[tuple[float, str]]:
    """``"0.8*dpo+sft"`` to ``[(0.8, "dpo"), (1.0, "sft")]``.

    Raises:
      ValueError: if a weight is not a positive number.
    """
    parts = []
    # Not at the sign of an exponent, as in 1e+2*dpo; but after the e of hinge.
    for part in re.split(r"(?<![0-9.][eE])\+", text):
        weight, star, name = part.rpartition("*")
        try:
            number = float(weight) if star else 1.0
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise ValueError(
                f"{weight!r} in the loss {text!r} is no positive weight; write sums as "
                "0.8*dpo+0.2*sft."
            )
        parts.append((number, name.strip()))
    return parts


def defaults_of(objective: Objective) -> dict[str, Setting]:
    """The settings of a loss and their defaults."""
    return {
        name: parameter.default
        for name, parameter in _keywords(objective.function).items()
    }


def _make_term(
    name: str, weight: float, objective: Objective, given: Mapping[str, Setting]
) -> Term:
    known = defaults_of(objective)
    settings = {key: value for key, value in given.items() if key in known}
    modifiers = {
        key: value
        for key, value in given.items()
        if key not in known and _can_modify(key, objective)
    }
    if "divergence" not in modifiers:
        modifiers.pop("divergence_alpha", None)
    for key, value in (settings | modifiers).items():
        check_setting(name, key, value)
    # The defaults too: what the weighting of wpo asks for, say.
    term = Term(name, weight, objective, known | settings, modifiers)
    divergence = {**term.settings, **modifiers}.get("divergence")
    if "divergence_alpha" in given and divergence not in (None, "alpha_divergence"):
        raise ValueError(
            f"divergence_alpha has no effect on {divergence}; leave it out or set "
            "divergence to alpha_divergence."
        )
    return term


def _check_divergence(terms: tuple[Term, ...]) -> None:
    """One policy is held by one divergence: all terms with a reference must take it."""
    for term in terms:
        taken = "divergence" in {**term.settings, **term.modifiers}
        if "reference" in term.objective.needs and not taken:
            raise ValueError(
                f"divergence does not hold for {term.name}, where the partition "
                "function does not cancel; leave it out or the term."
            )


def _can_modify(setting: str, objective: Objective) -> bool:
    """Where the theory holds: divergences need log Z to cancel, weights no sorting."""
    if setting not in MODIFIERS or objective.kind != "pair":
        return False
    if "reward_head" in objective.needs:
        return False
    if setting in ("divergence", "divergence_alpha"):
        return objective.cancels
    if objective.batchwise:
        return False
    return setting == "weighting" or "reference" in objective.needs


def _kinds(terms: tuple[Term, ...]) -> tuple[Kind, ...]:
    """The kinds of examples that terms take; sft takes the chosen one of a pair."""
    kinds: dict[Kind, None] = {term.objective.kind: None for term in terms}
    if "pair" in kinds:
        kinds = {t.objective.kind: None for t in terms if t.name != "sft"}
    return tuple(kinds)


def _arguments(term: Term, candidates: Scores) -> tuple[Scores, ...]:
    """What a term's function takes of the completions ``[*batch, completions]``."""
    if term.objective.kind == "ranked":
        return (candidates,)
    two = term.objective.kind == "pair" or "mismatched" in term.objective.needs
    return tuple(
        jax.tree.map(lambda array, k=k: array[..., k], candidates)
        for k in range(2 if two else 1)
    )


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _unknown(name: str, objectives: Mapping[str, Objective]) -> str:
    if name in MIXTURES:
        return (
            f"{name!r} is a sum itself and cannot be part of one; write out its terms, "
            f"{MIXTURES[name].terms}."
        )
    names = [*objectives, *MIXTURES]
    nearest = get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return (
        f"There is no loss {name!r}; did you mean {nearest!r}? "
        f"Losses: {', '.join(names)}."
    )


def _no_effect(setting: str, name: str, terms: tuple[Term, ...]) -> str:
    known = list(
        dict.fromkeys(
            key
            for term in terms
            for key in (
                *term.settings,
                *(m for m in MODIFIERS if _can_modify(m, term.objective)),
            )
        )
    )
    if setting == "divergence_alpha" and setting in known:
        return "divergence_alpha has an effect only with divergence alpha_divergence."
    nearest = get_close_matches(setting, known, n=1)
    hint = f"; did you mean {nearest[0]!r}" if nearest else ""
    return (
        f"The loss {name!r} has no setting {setting!r}; "
        f"it has {', '.join(known) or 'none'}{hint}."
    )
