"""The rooms of core build on each other in one direction, and the engine packages have no circle of imports.

Every import counts: at module level, inside functions, and under `TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
CORE = ROOT / "packages" / "core" / "src" / "rlhf_core"
PACKAGES = {path.name: path for path in ROOT.glob("packages/*/src/*") if path.is_dir()}
PAGE = ROOT / "docs" / "architecture.md"

LEVELS = [
    ["option_text.py"],
    ["errors.py", "lazy.py"],
    ["util"],
    ["contract"],
    ["asynchronous", "models", "plugins"],
    ["analysis", "config", "data", "plugin.py", "rollout"],
    ["observer", "training"],
    ["checkpoint", "evaluator", "forecast", "loop.py", "reward", "strategy"],
    ["launcher"],
    ["endpoint", "environment", "run"],
    ["recipe", "translation"],
    ["__init__.py"],
    ["testing"],
    ["cli"],
    ["__main__.py"],
]
"""Rooms of core from the lowest level to the highest: folders, and the files in the root of the package. A room imports
rooms of lower levels only. A new folder of core gets its level here."""

START, END = "<!-- rooms: written by packages/core/tests/repository/test_meta_rooms.py -->", "<!-- end of rooms -->"


def modules(package: Path) -> dict[str, Path]:
    """Return `{dotted name: file}` of a package."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = [package.name, *file.relative_to(package).with_suffix("").parts]
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imported(source: str, known: Mapping[str, object]) -> Iterator[str]:
    """Yield the modules of `known` that `source` imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            assert not node.level, "relative imports hide which room they name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module


def module_graph(package: Path) -> dict[str, set[str]]:
    """Return which modules of a package each of its modules imports."""
    known = modules(package)
    return {name: set(imported(file.read_text("utf-8"), known)) - {name} for name, file in known.items()}


def room(module: str) -> str:
    """Return the folder of core that a module is in, or the file in the root of the package."""
    _, *parts = module.split(".")
    if not parts:
        return "__init__.py"
    return parts[0] if (CORE / parts[0]).is_dir() else f"{parts[0]}.py"


def room_graph() -> dict[str, dict[str, list[str]]]:
    """Return `{room: {room that it imports: ["module -> module", ...]}}` of core."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, targets in module_graph(CORE).items():
        edges = found.setdefault(room(name), {})
        for target in sorted(targets):
            if room(target) != room(name):
                edges.setdefault(room(target), []).append(f"{name} -> {target}")
    return found


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Return everything that `start` imports, directly or through others."""
    found: set[str] = set()
    todo = [start]
    while todo:
        fresh = graph[todo.pop()] - found
        found |= fresh
        todo += fresh
    return found


def drawing() -> str:
    """Return the drawing of the rooms, top level first. Arrows that follow from others are left out."""
    graph = {name: set(edges) for name, edges in room_graph().items()}
    lines = []
    for level in reversed(LEVELS):
        for name in level:
            indirect = set[str]().union(*(reachable(graph, other) for other in graph[name]))
            arrows = " ".join(sorted(graph[name] - indirect))
            lines.append(f"    {name:<12}{'──▶ ' + arrows if arrows else ''}".rstrip())
        lines.append("")
    return "\n".join(lines).rstrip()


def cycle_of(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the names along a circle of imports; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_room_imports_only_rooms_of_lower_levels() -> None:
    levels = {name: i for i, level in enumerate(LEVELS) for name in level}
    graph = room_graph()
    assert set(graph) == set(levels), "name the level of each room in LEVELS"
    upward = [
        f"{name} must not import {other}: {', '.join(imports)}"
        for name, edges in graph.items()
        for other, imports in edges.items()
        if levels[other] >= levels[name]
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("package", sorted(PACKAGES.keys() - {"rlhf_core"}))
def test_the_modules_of_a_package_import_each_other_in_no_circle(package: str) -> None:
    assert not cycle_of(module_graph(PACKAGES[package]))


def test_the_page_on_architecture_draws_the_rooms_as_they_are() -> None:
    """To write the drawing again: `python packages/core/tests/repository/test_meta_rooms.py`."""
    page = PAGE.read_text("utf-8")
    assert page.partition(START)[2].partition(END)[0].strip("\n") == drawing()


def test_the_page_on_architecture_describes_every_folder_of_core_in_a_line() -> None:
    listed = re.findall(r"^\| `(\w+(?:/|\.py))` \|", PAGE.read_text("utf-8"), re.MULTILINE)
    rooms = {name if name.endswith(".py") else f"{name}/" for name in room_graph()} - {"__init__.py", "__main__.py"}
    assert sorted(listed) == sorted(rooms)


def test_imports_count_wherever_they_are() -> None:
    source = """
from a.one import x
if TYPE_CHECKING:
    from a.two import y
def f():
    import a.three
    from a import four, five
"""
    known = dict.fromkeys(["a", "a.one", "a.two", "a.three", "a.four"])
    assert list(imported(source, known)) == ["a.one", "a.two", "a.three", "a.four", "a"]


def test_a_circle_of_imports_is_found() -> None:
    assert set(cycle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})) == {"a", "b", "c"}
    assert not cycle_of({"a": {"b", "c"}, "b": {"c"}, "c": set()})


if __name__ == "__main__":
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    PAGE.write_text(f"{before}{START}\n\n{drawing()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
