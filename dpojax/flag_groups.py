"""The settings of a run in groups, each of which fits a screen of its help.

A group says nothing of its settings' names: flags are what they would be without it.
This file knows tyro and the order of the settings, and nothing else of them.
"""

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from dpojax.config import TrainConfig

# The first setting of each group, and what the group is called. Settings that are
# groups themselves stay what they are.
_BEGINNINGS = {
    "model": "run",
    "reference": "objective",
    "train_split": "examples",
    "batch_size": "length",
    "compute_dtype": "machine",
    "token_metrics": "record",
    "token_file": "bench",
    "topology": "plan",
    "over": "sweep",
}


def make_registry() -> ConstructorRegistry:
    """Rules by which tyro makes flags of a `TrainConfig` and of what extends it."""
    registry = ConstructorRegistry()
    registry.struct_rule(_rule)
    return registry


def _rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    kind = info.type
    if not (isinstance(kind, type) and issubclass(kind, TrainConfig)):
        return None
    default = vars(info.default if isinstance(info.default, kind) else kind())
    specs = [
        StructFieldSpec(
            name=title,
            type=tyro.conf.OmitArgPrefixes[group],
            default=group(**{each.name: default[each.name] for each in fields(group)}),
        )
        for title, group in _groups(kind).items()
    ]
    hints = get_type_hints(kind, include_extras=True)
    specs += [
        StructFieldSpec(name=name, type=hints[name], default=value)
        for name, value in default.items()
        if is_dataclass(value)
    ]

    def instantiate(**given: Any) -> TrainConfig:
        settings: dict[str, Any] = {}
        for name, value in given.items():
            settings |= {name: value} if name in default else vars(value)
        return kind(**settings)

    instantiate.__doc__ = kind.__doc__  # which help begins with
    return StructConstructorSpec(instantiate=instantiate, fields=tuple(specs))


def _groups(kind: type[TrainConfig]) -> dict[str, type]:
    """A class for each group of settings, by its title."""
    hints, documented = get_type_hints(kind, include_extras=True), _documented(kind)
    found: dict[str, list[tuple[str, Any]]] = {}
    title = ""
    for each in fields(kind):
        title = _BEGINNINGS.get(each.name, title)
        if not is_dataclass(hints[each.name]):
            described = tyro.conf.arg(help=documented[each.name])
            hint = Annotated[hints[each.name], described]
            found.setdefault(title, []).append((each.name, hint))
    return {
        title: make_dataclass(title, settings, namespace={"__doc__": ""})
        for title, settings in found.items()
    }


def _documented(kind: type) -> dict[str, str]:
    """What stands below each setting, those of the classes that are extended too."""
    texts: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for setting, text in zip(tree.body, tree.body[1:], strict=False):
            match setting, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    texts[name] = " ".join(words.split())
    return texts
