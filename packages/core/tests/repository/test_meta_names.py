"""Names are nouns and verbs: no module, class, function or method is called by a participle or a preposition alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))

BARE = set(
    "said kept told shown lent made done seen known drawn given taken meant sent held found begun chosen frozen written "
    "hidden grown broken forgotten stolen spread built bound left lost met paid sold thought torn won worn "
    "near now beside within without under over after before onto into between among apart aside away once twice ahead "
    "at by for from in of off on out to up with as than so only still even alone unseen awaiting lending looking telling "
    "saying trying watching keeping meeting meet lend tell say".split()
)
"""Participles without the ending -ed, prepositions, adverbs, and verbs that say nothing of their object."""

NOUNS = {"seed", "speed", "feed", "embed", "need"}
"""Words that end in -ed and are nouns or verbs."""

ALLOWED = {
    "gathered": "`with role.gathered():`, in the contract of roles and strategies",
    "trained": "an adjective: `if spec.trained`",
    "required": "an adjective: `if option.required`",
    "distributed": "the field's word, as in `torch.distributed`",
    "transformed": "the file of the provider `transformed`",
    "selected": "the file of the provider `selected`",
    "over": "`Metric.over(values, mask)`: a mean over values",
    "say": "a line on the console",
    "to": "`inputs.to(device)`, as tensors have it",
}


def words(name: str) -> list[str]:
    """Return the words of a name in snake case or camel case, in lower case."""
    return [each.lower() for each in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)]


def is_bare(name: str) -> bool:
    """Return True if a name is one word, and that word names neither a thing nor an act."""
    found = words(name)
    return len(found) == 1 and (found[0] in BARE or (found[0].endswith("ed") and found[0] not in NOUNS))


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of the classes, functions and methods of a module; functions inside functions are left out."""
    todo: list[ast.AST] = [tree]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield node.lineno, node.name
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                todo.append(node)


def test_no_name_is_a_bare_participle_or_preposition() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in SOURCES
        for line, name in [(1, path.stem), *names(ast.parse(path.read_text(encoding="utf-8")))]
        if is_bare(name) and name.strip("_") not in ALLOWED
    ]
    assert not found, "\n".join(["name what it is or what it does:", *found])


def test_every_exception_is_used() -> None:
    trees = [(path.stem, ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES]
    used = {name.strip("_") for stem, tree in trees for name in (stem, *(name for _, name in names(tree)))}
    assert not ALLOWED.keys() - used


@pytest.mark.parametrize("name", ["said", "_kept", "Placed", "_Loaded", "described", "of", "near", "Drawn"])
def test_a_bare_word_is_seen(name: str) -> None:
    assert is_bare(name)


@pytest.mark.parametrize("name", ["seed_for", "kept_mass", "ForwardCache", "seed", "trained_roles", "sampled_rows"])
def test_a_phrase_or_a_noun_is_not(name: str) -> None:
    assert not is_bare(name)
