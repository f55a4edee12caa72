"""The packages under examples/plugins and the code of the documents are what a stranger would write, with public names only."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("rlhf_algos", reason="examples may import rlhf-algos")
pytest.importorskip("rlhf_eval_gcg", reason="its README shows an optimizer of suffixes")

ROOT = Path(__file__).resolve().parents[4]
PLUGINS = sorted(path.parent for path in ROOT.glob("examples/plugins/*/pyproject.toml"))
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "*/*/README.md", "examples/plugins/*/README.md")
    for path in ROOT.glob(pattern)
)
MODULES = ("rlhf_core", "rlhf_core.testing", "rlhf_core.errors", "rlhf_algos", "rlhf_eval_gcg.attack")
PUBLIC = {name: set(import_module(name).__all__) for name in MODULES}
PUBLIC["rlhf_core.lazy"] = {"torch"}


def python_blocks(text: str) -> list[str]:
    """Return the python blocks of a document, without their indentation."""
    found = re.findall(r"^( *)```python\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


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


def test_the_code_of_the_documents_imports_public_names_only() -> None:
    blocks = 0
    found = {}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        own = {Path(name).stem for name in re.findall(r"<!-- (?:file|append): (\S+) -->", text)}
        for block in python_blocks(text):
            blocks += 1
            found[f"{document.name}: {block[:40]!r}"] = list(private_imports(ast.parse(block), own))
    assert blocks >= 15
    assert not {place: lines for place, lines in found.items() if lines}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_can_be_imported_and_is_documented(name: str) -> None:
    module = import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    objects = [getattr(module, each) for each in module.__all__]
    described = [each for each in objects if inspect.isclass(each) or inspect.isfunction(each)]
    assert not [each.__name__ for each in described if not (each.__doc__ or "").strip()]


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
        "from rlhf_algos import gae",
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
