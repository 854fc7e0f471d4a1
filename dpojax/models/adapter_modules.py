"""Which projections adapters are given to, by the names that Hugging Face uses.

A module there is one projection of one layer; here all layers of one are stacked. Where
a family fuses several of our projections into one module, they are chosen together. It
opens no file and knows nothing of how adapters compute.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dpojax.models.families import family_of, num_heads_of
from dpojax.models.functional import Params
from dpojax.models.weight_places import Place, as_places, is_place


class Module(NamedTuple):
    """A projection of Hugging Face's in all layers, and which of ours it holds."""

    names: list[str]  # one for each layer
    parts: dict[str, Place]  # our paths in a layer, as attention/query

    @property
    def is_fused(self) -> bool:
        """Whether it holds several of ours, side by side along its outputs."""
        return len(self.parts) > 1

    @property
    def end(self) -> str:
        """The last part of its name, as q_proj."""
        return self.names[0].split(".")[-1]


def modules_of(base: Params, settings: Mapping[str, Any]) -> list[Module]:
    """Every projection that can have an adapter; those are in layers.

    Args:
      base: parameters of the base, or their shapes.
      settings: contents of its ``config.json``.
    """
    places = as_places(base, family_of(settings), num_heads_of(settings))
    modules: dict[str, Module] = {}
    for path, place in jax.tree.leaves_with_path(places["blocks"], is_leaf=is_place):
        first, *_, kind = (entry.key for entry in path)
        if first in ("attention", "mlp") and kind == "kernel":
            names = [name.removesuffix(".weight") for name in place.names]
            ours = "/".join(entry.key for entry in path[:-1])
            modules.setdefault(names[0], Module(names, {})).parts[ours] = place
    return list(modules.values())


def adapted_modules(
    chosen: frozenset[str], base: Params, settings: Mapping[str, Any]
) -> list[Module]:
    """The modules that hold any of the chosen projections of ours."""
    return [
        module
        for module in modules_of(base, settings)
        if not chosen.isdisjoint(module.parts)
    ]


def choose_modules(
    targets: Sequence[str], base: Params, settings: Mapping[str, Any]
) -> frozenset[str]:
    """The projections that targets name, as PEFT understands them.

    Args:
      targets: each ``all-linear``, every projection of every layer; or a module's name
        or its end, as ``q_proj``; or a regular expression of whole names.
      base: parameters of the base, or their shapes.
      settings: contents of its ``config.json``.

    Returns:
      Our paths in a layer, as ``attention/query``.

    Raises:
      ValueError: for a target that matches no module, or one of some layers only.
    """
    modules = modules_of(base, settings)
    chosen: set[str] = set()
    for target in targets:
        matched = [module for module in modules if _matches(target, module)]
        if not matched:
            raise ValueError(
                f"The LoRA target {target!r} matches no projection of the model; give "
                "all-linear, a regular expression of whole names, or some of "
                f"{', '.join(sorted({module.end for module in modules}))}."
            )
        chosen |= {part for module in matched for part in module.parts}
    return frozenset(chosen)


def as_last_layers(wanted: int | None, base: Params) -> int | None:
    """How many of the last layers get adapters; None: all.

    Args:
      wanted: that many, or None.
      base: parameters of the base, or their shapes.

    Raises:
      ValueError: for less than one, or more than there are.
    """
    number = num_layers_of(base)
    if wanted is not None and not 1 <= wanted <= number:
        raise ValueError(
            f"lora.layers is {wanted}; of a model of {number} layers, 1 to {number} "
            "can have adapters."
        )
    return None if wanted == number else wanted


def num_layers_of(base: Params) -> int:
    """How many layers are stacked."""
    return jax.tree.leaves(base["blocks"])[0].shape[0]


def short_name(
    module: Module, chosen: Sequence[Module], every: Sequence[Module]
) -> str:
    """The end of a module's name that no module has which is not chosen."""
    ours = {one.names[0] for one in chosen}
    others = {one.end for one in every if one.names[0] not in ours}
    parts = module.names[0].split(".")
    return module.end if module.end not in others else ".".join(parts[-2:])


def _matches(target: str, module: Module) -> bool:
    if target == "all-linear":
        return True

    def named(name: str) -> bool:
        end = name == target or name.endswith("." + target)
        return end or re.fullmatch(target, name) is not None

    layers = [named(name) for name in module.names]
    if any(layers) and not all(layers):
        missed = module.names[layers.index(False)]
        raise ValueError(
            f"The LoRA target {target!r} does not match {missed}; adapters are given "
            "to a projection in every layer, in the last ones by --lora.layers, or in "
            "none."
        )
    return all(layers)
