"""Documentation of provider classes, read from source text: `--help` and `plugins` import nothing for it.

Python keeps no docstring of a dataclass field, and importing a provider to ask for its own can cost seconds. Both are
in the source file, so that is what is read: the class's docstring, and the string right under each annotated field.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["ClassDocs", "docs_of", "first_line"]


@dataclass(frozen=True)
class ClassDocs:
    """Documentation of a class, parsed."""

    doc: str = ""
    """cleaned docstring of the class"""
    fields: Mapping[str, str] = field(default_factory=dict)
    """docstring of each field, as one line"""


def docs_of(target: type | str) -> ClassDocs:
    """The documentation of a class, or of `"module:Class"` without importing it; empty where there is no source."""
    if isinstance(target, str):
        module, _, name = target.partition(":")
        return _module_docs(module).get(name, ClassDocs())
    docs = [_module_docs(cls.__module__).get(cls.__qualname__, ClassDocs()) for cls in target.__mro__]
    fields = {name: text for known in reversed(docs) for name, text in known.fields.items()}
    return ClassDocs(docs[0].doc, fields)


def first_line(target: type | str) -> str:
    """The one-line description of a provider: its docstring's first line without the full stop."""
    return docs_of(target).doc.partition("\n")[0].rstrip(".")


@cache
def _module_docs(module: str) -> Mapping[str, ClassDocs]:
    """`{qualified class name: its documentation}` of a module's source file."""
    try:
        file = getattr(sys.modules.get(module), "__file__", None)  # also of a script, which has no spec
        if file is None:
            spec = find_spec(module)
            file = spec.origin if spec is not None else None
        tree = ast.parse(Path(file).read_text(encoding="utf-8") if file else "")
    except Exception:  # find_spec imports parent packages, and a listing must survive whatever they do
        return {}
    found: dict[str, ClassDocs] = {}
    _collect(tree, "", found)
    return found


def _collect(node: ast.AST, prefix: str, found: dict[str, ClassDocs]) -> None:
    """Add every class under `node`, classes inside classes and functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            found[prefix + child.name] = ClassDocs(ast.get_docstring(child) or "", _field_docs(child))
            _collect(child, f"{prefix}{child.name}.", found)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            _collect(child, f"{prefix}{child.name}.<locals>.", found)
        else:
            _collect(child, prefix, found)


def _field_docs(node: ast.ClassDef) -> dict[str, str]:
    """Return the string right under each annotated field."""
    docs: dict[str, str] = {}
    for statement, after in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        match after:
            case ast.Expr(value=ast.Constant(value=str(text))):
                docs[statement.target.id] = " ".join(inspect.cleandoc(text).split())
    return docs
