"""Write the reference pages of the site as Markdown: hooks, public names, and every provider with its options.

The pages exist in the built site only (`nox -s site`). They need no torch: signatures and docstrings come from the source text,
options from the classes that `--help` reads.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import rlhf_core
from rlhf_core.config.docstrings import docs_of
from rlhf_core.config.option_fields import options_of
from rlhf_core.config.value_types import metavar
from rlhf_core.contract.hooks import KINDS
from rlhf_core.plugins.registry import Registry

__all__ = ["pages"]

SOURCE = Path(rlhf_core.__file__).parent
WITHOUT_OPTIONS = ("output",)
"""Kinds whose providers have no options, and whose modules import torch."""

GENERATED = "*This page is generated from the source code when the site is built.*\n\n"


def pages() -> dict[str, str]:
    """Return `{page: Markdown}` of the generated reference."""
    registry = Registry()
    found = {"reference/hook-specs.md": _hooks(), "reference/public-names.md": _public_names()}
    for kind in KINDS:
        found[f"reference/providers/{kind}.md"] = _providers(kind, registry)
    return found


def _providers(kind: str, registry: Registry) -> str:
    """List the providers of a kind, each with a table of its options."""
    parts = [f"# Providers of kind `{kind}`\n\n{GENERATED}"]
    for name, entry in registry.table(kind).items():
        parts += [f"## `{name}`\n\n", f"*{entry.plugin.distribution}*\n\n", f"{docs_of(entry.target).doc}\n\n"]
        if kind in WITHOUT_OPTIONS:
            continue
        options = list(options_of(registry.resolve(kind, name)))
        rows = [(each.path, metavar(each.annotation), each.note, each.doc) for each in options]
        if rows:
            parts += ["| option | type | default | meaning |\n|---|---|---|---|\n"]
            parts += [
                f"| `{path}` | `{_cell(type_)}` | {_cell(note)} | {_cell(doc)} |\n" for path, type_, note, doc in rows
            ]
            parts += ["\n"]
    return "".join(parts)


def _cell(text: str) -> str:
    """Escape what ends a table cell or begins an HTML tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").removeprefix("default: ")


def _hooks() -> str:
    """Return every hook specification with its signature and docstring."""
    tree = ast.parse((SOURCE / "contract" / "hooks.py").read_text(encoding="utf-8"))
    parts = [f"# Hook specifications\n\n{GENERATED}{ast.get_docstring(tree)}\n\n"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("rlhf_"):
            parts += [f"## `{node.name}`\n\n", _signature(node), _prose(node)]
    return "".join(parts)


def _public_names() -> str:
    """Return every public name of `rlhf_core` with its fields, methods and docstrings."""
    homes = {name: module for module, names in rlhf_core._HOMES.items() for name in names.split()}
    parts = [f"# Public names of `rlhf_core`\n\n{GENERATED}"]
    for name in rlhf_core.__all__:
        node = _definition(f"rlhf_core.{homes[name]}", name)
        parts += [f"## `{name}`\n\n", f"`rlhf_core.{homes[name]}`\n\n"]
        match node:
            case ast.ClassDef():
                parts += [_prose(node), *_members(node)]
            case ast.FunctionDef():
                parts += [_signature(node), _prose(node)]
            case _:
                parts += [f"```python\n{ast.unparse(node)}\n```\n\n"]
    return "".join(parts)


def _definition(module: str, name: str) -> ast.stmt:
    """Return the statement that defines a name, in the module or in the one that it is imported from."""
    file = SOURCE.joinpath(*module.split(".")[1:])
    tree = ast.parse((file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text(encoding="utf-8"))
    for node in tree.body:
        match node:
            case ast.ClassDef(name=found) | ast.FunctionDef(name=found) if found == name:
                return node
            case ast.Assign(targets=[ast.Name(id=found)]) | ast.AnnAssign(target=ast.Name(id=found)) if found == name:
                return node
            case ast.ImportFrom(module=str(source)) if name in [each.name for each in node.names]:
                return _definition(source, name)
    raise LookupError(f"{module} does not define {name}")


def _members(node: ast.ClassDef) -> Iterator[str]:
    """Yield the bases, the fields with their documentation, and the public methods of a class."""
    if node.bases:
        yield f"Bases: {', '.join(f'`{ast.unparse(base)}`' for base in node.bases)}.\n\n"
    fields = [row for row in _fields(node) if not row[0].startswith("_")]
    if fields:
        yield "| field | type | default | meaning |\n|---|---|---|---|\n"
        yield from (
            f"| `{name}` | `{_cell(kind)}` | {default} | {_cell(doc)} |\n" for name, kind, default, doc in fields
        )
        yield "\n"
    for method in node.body:
        public = isinstance(method, ast.FunctionDef) and (method.name == "__call__" or not method.name.startswith("_"))
        if public:
            yield from (_signature(method), _prose(method))


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and documentation of each annotated field."""
    for statement, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.AnnAssign):
            default = f"`{_cell(ast.unparse(statement.value))}`" if statement.value else ""
            doc = ""
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    doc = " ".join(inspect.cleandoc(text).split())
            yield ast.unparse(statement.target), ast.unparse(statement.annotation), default, doc


def _signature(node: ast.FunctionDef) -> str:
    """Return the line that defines a function."""
    decorators = "".join(f"@{ast.unparse(each)}\n" for each in node.decorator_list if ast.unparse(each) != "hookspec")
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"```python\n{decorators}def {node.name}({ast.unparse(node.args)}){returned}\n```\n\n"


def _prose(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Return a docstring, with the sections of arguments and results as lists."""
    lines = []
    for line in (ast.get_docstring(node) or "").splitlines():
        heading = line.rstrip(":") if line in ("Args:", "Returns:", "Raises:", "Yields:") else ""
        if heading:
            lines += [f"**{heading}**", ""]
        elif line.startswith("    ") and ": " in line and not line.startswith("     "):
            lines += [f"- {line.strip()}"]
        else:
            lines += [line]
    return "\n".join(lines) + "\n\n" if lines else ""
