"""Errors, warnings and notes use plain words, stay on one line, and have at most one semicolon."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))

ERRORS = {
    "ContractError",
    "DataError",
    "EpisodeOver",
    "HttpError",
    "MissingPackage",
    "NameConflict",
    "NotFinite",
    "NotFiniteReward",
    "OptionError",
    "PluginError",
    "RunStopped",
    "UnknownName",
    "UsageError",
    "WorkerLost",
}
LOGS = {"info", "warning", "error"}

HABITS = re.compile(
    r"\b(nobody|somebody|everybody|whoever|says?|said|tells?|told|go(es|ing)? on|(its|their) own [a-z]+ed|of (its|their) own|"
    r"by (itself|themselves)|beside|lies?|stands?|anew|mend|nothing of|a line each)\b"
    r"|(?<!there )\b(is|are) no [a-z]+"
    r"|, say\b|; say\b|\bsay,"
)
"""Words that users had to read twice; each has a plain one: report, continue, separate, in addition to, is, again, fix."""

EXCEPTIONS: dict[str, str] = {}
"""Messages that keep such a word, and why; fewer than ten."""


def text_of(node: ast.AST) -> str:
    """Return the text of a literal, with `{}` for each value; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return ""


def literals(node: ast.AST) -> Iterator[str]:
    """Yield the literals under an argument; those of calls inside it, such as names of options, are no messages."""
    if text := text_of(node):
        yield text
    elif not isinstance(node, ast.Call):
        for child in ast.iter_child_nodes(node):
            yield from literals(child)


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of what a module raises for users and logs."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        logs = (
            isinstance(node.func, ast.Attribute) and name in LOGS and ast.unparse(node.func.value) in ("log", "logger")
        )
        if name in ERRORS or logs:
            for argument in node.args:
                for text in literals(argument):
                    if " " in text:
                        yield node.lineno, text


def faults(text: str) -> list[str]:
    """Return what is wrong with a message."""
    found = [match[0] for match in HABITS.finditer(text)]
    if text.count("; ") > 1:
        found.append("two semicolons")
    if "\n" in text:
        found.append("two lines")
    return found


def test_messages_are_plain_and_stay_on_one_line() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text} ({', '.join(wrong)})"
        for path in SOURCES
        for line, text in messages(ast.parse(path.read_text(encoding="utf-8")))
        if (wrong := faults(text)) and text not in EXCEPTIONS
    ]
    assert not found, "\n".join(found)


def test_exceptions_are_few_and_used() -> None:
    texts = {
        text for path in SOURCES for _, text in messages(ast.parse(path.read_text(encoding="utf-8"))) if faults(text)
    }
    assert len(EXCEPTIONS) < 10 and not EXCEPTIONS.keys() - texts


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ('raise UsageError(f"{path} is no file of a run")', ["is no file"]),
        ('raise OptionError("url", "goes on; say, later")', ["goes on", "; say"]),
        ('raise DataError("a" if b else f"{c} lies there")', ["lies"]),
        ('log.warning(f"{x} has a place of its own")', ["of its own"]),
        ('raise UsageError("a b; c d; e f")', ["two semicolons"]),
        ("raise UsageError(f\"{path} is not a run; use {run_option('no say')}\")", []),
        ('raise KeyError("nobody says it")', []),
    ],
)
def test_a_habit_is_found_in_errors_and_logs(code: str, wrong: list[str]) -> None:
    assert [each for _, text in messages(ast.parse(code)) for each in faults(text)] == wrong
