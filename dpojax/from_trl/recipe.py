"""A recipe's YAML file as names and values. Knows no setting of either side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Recipe(NamedTuple):
    """The keys of a file and what they say."""

    path: Path
    values: Mapping[str, Any]


class _Loader(yaml.SafeLoader):
    """The safe loader; YAML's own rule that keys are unique is kept."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} is not a name",
                problem_mark=key_node.start_mark,
            )
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} stands twice",
                problem_mark=key_node.start_mark,
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
      ValueError: if there is no such file, or it is no YAML of names and values; the
        sentence names the line.
    """
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}.")
    try:
        values = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys with values; is it a recipe of TRL?")
    return Recipe(path, values)
