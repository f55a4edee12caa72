"""The names in tests that mean the program, found in the text of the tests: the program cannot influence it.

A program that defines `abs`, `len` or `math` changes nothing in tests that use them: these are Python's, unless nothing
else could be under test, as in `assert sum(10, 15) == 6`.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterable, Sequence

from rlhf_core.reward.sandbox.wire import DATA_ATTRIBUTES

__all__ = ["ALIASES", "PRELUDE", "class_names", "free_names", "trusted_names"]

ALIASES = {"np": "numpy", "pd": "pandas", **{name: name for name in "numpy pandas pytest scipy sympy torch".split()}}
"""Names that a test need not import, in addition to the standard library's modules; a program may define them too."""
PRELUDE = {
    name: module
    for module, names in {
        "typing": "Any Callable Dict FrozenSet Iterable Iterator List Optional Sequence Set Tuple Union",
        "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "math": "inf isclose isnan nan pi",
    }.items()
    for name in names.split()
}
"""Other names that tests use and leave to the program to import: name -> module."""


def free_names(tests: Sequence[str]) -> set[str]:
    """Return the names that the tests use and do not define; some may be Python's."""
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    return {node.id for node in nodes if isinstance(node, ast.Name)} - _bound_names(nodes)


def trusted_names(tests: Sequence[str]) -> set[str]:
    """Return the names that are Python's in these tests, whatever the program defines.

    Built-in names, modules of the standard library (where the tests use an attribute of it) and `PRELUDE`; but if the
    tests have no other free name and call exactly one of these, that one is the program's.
    """
    free = free_names(tests)
    called = {_called_name(node) for test in tests for node in ast.walk(ast.parse(test))}
    modules = {name for name in free if name in sys.stdlib_module_names or name in ALIASES} - called
    trusted = set(vars(builtins)) | modules | PRELUDE.keys()
    under_test = free & called
    if free <= trusted and len(under_test) == 1:
        return trusted - under_test
    return trusted


def class_names(tests: Sequence[str]) -> set[str]:
    """Return the free names that the tests use as classes of the program.

    They begin with a capital letter, and the tests read an attribute that no built-in type has of what they make
    (`Stack().push(1)`, `stack = Stack(); stack.push(1)`) or of the class, ask `isinstance`, or compare two that they make.
    """
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    made: dict[str, str] = {}  # variable -> class
    for node in nodes:
        if isinstance(node, ast.Assign) and (name := _called_name(node.value)):
            made |= {target.id: name for target in node.targets if isinstance(target, ast.Name)}
    found: set[str | None] = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr not in DATA_ATTRIBUTES:
            owner = node.value
            found |= {owner.id, made.get(owner.id)} if isinstance(owner, ast.Name) else {_called_name(owner)}
        elif isinstance(node, ast.Compare):
            left = {_called_name(each) for each in ast.walk(node.left)}
            found |= left & {_called_name(each) for side in node.comparators for each in ast.walk(side)}
        elif isinstance(node, ast.Call) and _called_name(node) in ("isinstance", "issubclass") and len(node.args) == 2:
            found |= {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
    return {name for name in found if name and name.lstrip("_")[:1].isupper()} - _bound_names(nodes)


def _called_name(node: ast.AST) -> str | None:
    """Return `f` of `f(...)`."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def _bound_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that the tests themselves give a value to."""
    found: set[str] = set()
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                found.add(name)
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.arg(arg=name)
            ):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found.add(other or name.partition(".")[0])
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                found.add(name)
    return found
