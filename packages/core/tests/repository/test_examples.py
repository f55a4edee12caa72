"""The packages under examples/plugins are what a stranger would write: installable, and with public imports only."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
PLUGINS = sorted(path.parent for path in ROOT.glob("examples/plugins/*/pyproject.toml"))
PUBLIC = {name: set(import_module(name).__all__) for name in ("rlhf_core", "rlhf_core.testing", "rlhf_core.errors")}
PUBLIC["rlhf_core.lazy"] = {"torch"}


def private_imports(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Yield what a module takes from the packages of this repository that is not public; `own` are its own packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_"):
            module = str(node.module)
            names = {alias.name for alias in node.names}
            if module.split(".")[0] not in own and (hidden := names - PUBLIC.get(module, set())):
                yield f"line {node.lineno}: from {module} import {', '.join(sorted(hidden))}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] not in own and alias.name.startswith("rlhf_") and alias.name not in PUBLIC:
                    yield f"line {node.lineno}: import {alias.name}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in PUBLIC:
            module = ast.unparse(node.value)
            if node.attr not in PUBLIC[module] and f"{module}.{node.attr}" not in PUBLIC:
                yield f"line {node.lineno}: {module}.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_an_example_imports_public_names_only(folder: Path) -> None:
    own = {path.stem for path in [*folder.glob("src/*"), *folder.glob("rlhf_*.py")]}
    own |= {path.stem for path in folder.rglob("*_ranks.py")}
    files = sorted(folder.rglob("*.py"))
    found = {str(path.relative_to(folder)): list(private_imports(ast.parse(path.read_text()), own)) for path in files}
    assert files and not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "code",
    [
        "from rlhf_core.run.run import Run",
        "from rlhf_core import checkpoint",
        "from rlhf_core.testing.tiny import tiny_run",
        "import rlhf_core.config",
        "import rlhf_core\nrlhf_core.loop.train(None)",
        "from rlhf_algos.loss import clip",
        "run = import_module('rlhf_core.run.run')",
    ],
)
def test_a_private_import_would_be_seen(code: str) -> None:
    assert list(private_imports(ast.parse(code), {"rlhf_mine"}))


@pytest.mark.parametrize(
    "code",
    [
        "from rlhf_core import hookimpl, Run",
        "from rlhf_core.errors import UsageError",
        "from rlhf_core.lazy import torch",
        "import rlhf_core\nrlhf_core.make_config('grpo')",
        "from rlhf_mine.parts import Part",
        "import torch",
    ],
)
def test_a_public_import_is_accepted(code: str) -> None:
    assert not list(private_imports(ast.parse(code), {"rlhf_mine"}))


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_an_example_is_a_package_that_can_be_installed_and_tested(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "rlhf-core>=0.1,<0.2" in project["dependencies"], "the line that a third party writes"
    assert project["entry-points"]["rlhf"]
    assert project["name"].startswith("rlhf-")
    assert list(folder.rglob("test_*.py"))
    assert folder.name == "reward-brevity" or (folder / "README.md").exists(), (
        "the README of the repository is brevity's"
    )
