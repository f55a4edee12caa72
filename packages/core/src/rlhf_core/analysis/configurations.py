"""Configurations of several runs: which runs repeat one configuration with other seeds, and what differs between the rest."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.analysis.style import method_name
from rlhf_core.contract.options import RunConfig
from rlhf_core.errors import UsageError
from rlhf_core.util.text_files import read_text

__all__ = ["Group", "differences", "group_runs"]

NO_DIFFERENCE = frozenset(
    {"seed"} | {field.name for field in dataclasses.fields(RunConfig) if field.metadata.get("free")}
)
"""Options in which runs of one group may differ: the seed, and those that change no result."""

WORDS = 3
"""Options that a group is named by; one that differs in more is named after its folder."""


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, seeds apart."""

    name: str
    """display name, such as `GRPO` or `GRPO, actor.optim.lr=0.001`"""
    folders: tuple[Path, ...]
    """folders of the runs"""
    options: Mapping[str, Any]
    """every option by its path"""
    key: str
    """name that the color of the group follows from: the algorithm's if it distinguishes the groups"""


def group_runs(folders: Sequence[Path]) -> list[Group]:
    """Return the runs by configuration, in the order in which they are named.

    Raises:
        UsageError: a folder is named twice or holds no run.
    """
    found: dict[str, tuple[dict[str, Any], list[Path]]] = {}
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UsageError(f"{folder} is named twice; name each run once")
        seen.add(folder.resolve())
        options = _options(folder)
        found.setdefault(repr(sorted(options.items())), (options, []))[1].append(folder)
    trees = [options for options, _ in found.values()]
    changes = differences(trees)
    algorithms = [options.get("algorithm.use") for options in trees]
    distinct = len(trees) > 1 and None not in algorithms and len(set(algorithms)) == len(trees)
    groups: list[Group] = []
    for options, paths in found.values():
        # the presets of two algorithms differ in many options; only their names distinguish such groups
        name = method_name(str(options["algorithm.use"])) if distinct else _name(options, changes, paths[0])
        while any(each.name == name for each in groups):
            name += "'"
        algorithm = str(options.get("algorithm.use", ""))
        alone = sum(each.get("algorithm.use") == algorithm for each in trees) == 1
        groups.append(Group(name, tuple(paths), options, algorithm if alone else name))
    return groups


def differences(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the options that are not the same in all configurations, in their order."""
    names = dict.fromkeys(name for tree in trees for name in tree)
    return [name for name in names if any(tree.get(name) != trees[0].get(name) for tree in trees)]


def _options(folder: Path) -> dict[str, Any]:
    """Return the options of a run that change results, by path."""
    path = folder / "config.toml"
    try:
        tree = tomllib.loads(read_text(path))
    except (OSError, ValueError):
        raise UsageError(
            f"{str(folder)!r} contains no run with a readable config.toml; name the OUTPUT folders of runs"
        ) from None
    return {name: value for name, value in _flat(tree) if name.partition(".")[0] not in NO_DIFFERENCE}


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _name(options: Mapping[str, Any], changes: Sequence[str], folder: Path) -> str:
    """Return a group's name: its algorithm, and the options in which it differs where they are few."""
    algorithm = method_name(str(options.get("algorithm.use", folder.name)))
    more = [name for name in changes if name in options and name.partition(".")[0] != "algorithm"]
    own = [name for name in changes if name in options and name.startswith("algorithm.") and name != "algorithm.use"]
    if "algorithm.use" in changes and not more:
        return algorithm
    if len([*own, *more]) <= WORDS:
        return ", ".join([algorithm, *(f"{name}={options[name]}" for name in [*own, *more])])
    return re.sub(r"-?seed-?\d+$", "", folder.name) or folder.name
