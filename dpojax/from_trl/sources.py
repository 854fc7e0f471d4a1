"""Which examples: data sets, their shares and splits. Reads none of them."""

from collections.abc import Mapping
from typing import Any

from dpojax.from_trl.part import Part, Refusal, names, number

_NEUTRAL_CONFIGS = (None, "default")


def sources(values: Mapping[str, Any]) -> Part:
    """`data` and its splits, from whichever way the recipe names them."""
    mixture = values["dataset_mixture"] or {}
    if not isinstance(mixture, dict):
        raise ValueError(f"dataset_mixture is {mixture!r}; it must hold datasets.")
    ways = {
        "dataset_name": values["dataset_name"],
        "dataset_mixer": values["dataset_mixer"],
        "datasets": values["datasets"],
        "dataset_mixture": mixture.get("datasets"),
    }
    given = [name for name, value in ways.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both name the data; keep one of them.")
    if not given:
        return Part()
    if given == ["dataset_name"]:
        return _named(values)
    if given == ["dataset_mixer"]:
        return _mixed(values)
    size = mixture.get("test_split_size", values["test_split_size"])
    return _listed(given[0], ways[given[0]], size)


def _named(values: Mapping[str, Any]) -> Part:
    settings = {
        "data": (str(values["dataset_name"]),),
        "train_split": values["dataset_train_split"],
        "test_split": values["dataset_test_split"],
    }
    return Part(
        settings, refusals=_configs("dataset_config", [values["dataset_config"]])
    )


def _mixed(values: Mapping[str, Any]) -> Part:
    mixer = values["dataset_mixer"]
    if not isinstance(mixer, dict):
        raise ValueError(f"dataset_mixer is {mixer!r}; it must be names with shares.")
    shares = tuple(number(mixer, name) for name in mixer)
    settings: dict[str, Any] = {"data": tuple(mixer)}
    if set(shares) != {1.0}:
        settings["data_weights"] = shares
    splits = names(values["dataset_splits"] or ["train", "test"], "dataset_splits")
    trained = [name for name in splits if "train" in name]
    tested = [name for name in splits if "test" in name]
    refusals = list(_configs("dataset_configs", values["dataset_configs"] or []))
    if len(trained) != 1 or len(tested) > 1:
        sentence = f"{', '.join(splits)}: dpojax trains on one split of each source"
        refusals.append(Refusal("dataset_splits", sentence, ("--train-split",)))
    else:
        settings["train_split"] = trained[0]
        settings |= {"test_split": tested[0]} if tested else {}
    return Part(settings, refusals=tuple(refusals))


def _listed(key: str, listed: Any, test_size: Any) -> Part:
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ValueError(f"{key} is {listed!r}; it must be a list of data sets.")
    known = {"id", "path", "config", "name", "split", "columns", "weight", "fraction"}
    refusals = [
        Refusal(key, f"a data set's {name!r} has no counterpart", ("--data",))
        for name in sorted(set().union(*listed) - known)
    ]
    found = [one.get("id", one.get("path")) for one in listed]
    if not all(isinstance(name, str) for name in found):
        raise ValueError(f"{key} has a data set without an id or a path.")
    refusals += _configs(key, [one.get("config", one.get("name")) for one in listed])
    settings: dict[str, Any] = {"data": tuple(found)}
    shares = [one.get("weight", one.get("fraction", 1.0)) for one in listed]
    if any(share != 1 for share in shares):
        settings["data_weights"] = tuple(
            number({"weight": 1.0 if share is None else share}, "weight")
            for share in shares
        )
    splits = {one.get("split", "train") for one in listed}
    if len(splits) > 1 or len(set(found)) < len(found):
        sentence = (
            f"it mixes {', '.join(sorted(map(str, splits)))}; dpojax reads each source "
            "once, and one split: say which with --data, --train-split and --test-split"
        )
        refusals.append(Refusal(key, sentence, ("--data",)))
    settings["train_split"] = min(splits)
    if test_size is not None:
        settings["test_size"] = number(
            {"test_split_size": test_size}, "test_split_size"
        )
    return Part(settings, refusals=tuple(refusals))


def _configs(key: str, configs: list[Any]) -> tuple[Refusal, ...]:
    asked = [str(one) for one in configs if one not in _NEUTRAL_CONFIGS]
    if not asked:
        return ()
    sentence = (
        f"{', '.join(dict.fromkeys(asked))}: dpojax reads default configurations of "
        "data sets; save this one to a file and name it by --data"
    )
    return (Refusal(key, sentence, ("--data",)),)
