"""Docstrings open with a verb or a name, help lines stand alone, and sentences of the pages stay short."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
SOURCES = sorted([*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("examples/plugins/*/src/**/*.py")])
PYTHON = sorted(
    path
    for pattern in (
        "*.py",
        "packages/**/*.py",
        "benchmarks/**/*.py",
        "docs/**/*.py",
        "examples/**/*.py",
        "tools/**/*.py",
    )
    for path in ROOT.glob(pattern)
)
PAGES = sorted(
    path
    for pattern in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/**/*.md",
        "packages/*/README.md",
        "examples/plugins/*/README.md",
    )
    for path in ROOT.glob(pattern)
    if path.name not in ("gpu-h200.md", "repulse-h200.md")  # as `benchmarks/gpu*.py` wrote them
)

LIMIT = 25
"""words of a sentence; code between backticks is one word"""

OPENING = re.compile(r"(What|Whether|How|Where|Who|When|Why|Which|The same|Of|And)\b")


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the docstring of the module, its classes and its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), text


def blocks(page: str) -> Iterator[str]:
    """Yield paragraphs and list items of a page, without code, tables, headings and comments."""
    page = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", "\n\n", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"<!--.*?-->", "\n\n", page, flags=re.DOTALL)
    block: list[str] = []
    for line in [*page.splitlines(), ""]:
        item = re.match(r" *(?:[*+-]|\d+\.) +", line)
        apart = not line.strip() or (re.match(r" *(#|\||<|!!!|    )", line) and not block)
        if (apart or item or re.match(r" *[#|<]", line)) and block:
            yield " ".join(block)
            block = []
        if not apart and not re.match(r" *[#|<]", line):
            block.append(line[item.end() :] if item else line.strip())


HELD = re.compile(r"(`+).+?\1|!?\[[^\]]*\]\([^)]*\)")
END = re.compile(r"(?<=[.!?])[)\"*_]*\s+(?=[\"(*_]*[A-Z0-9\0])")
SHORT = re.compile(r"\b(e\.g|i\.e|eq|vs|cf|et al)\.")


def sentences(block: str) -> list[str]:
    """Split a block at full stops, question and exclamation marks outside of code and links."""
    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match[0])
        return f"\0{len(held) - 1}\0"

    text = SHORT.sub(hold, HELD.sub(hold, block))
    ends = [match.end() for match in END.finditer(text)]
    parts = [text[start:end].strip() for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [re.sub("\0(\\d+)\0", lambda match: held[int(match[1])], part) for part in parts]


def words(sentence: str) -> int:
    """Count the words of a sentence; code between backticks is one word, a link counts by its text."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", sentence)
    text = re.sub(r"(`+).+?\1", "code", text)
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def long_sentences(page: str) -> list[str]:
    """Return the sentences of a page that have more words than the limit."""
    return [part for block in blocks(page) for part in sentences(block) if words(part) > LIMIT]


def test_docstrings_open_with_a_verb_or_the_name_of_the_thing() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{name}: {text.splitlines()[0]}"
        for path in PYTHON
        for name, text in docstrings(path)
        if OPENING.match(text)
    ]
    assert not found


HELP = re.compile(r"(whether|how|what|which|whose|where|who|when|why|the same|of|and)\b", re.IGNORECASE)
"""openings of a help line that hang on the name of the field or on the line before"""


def field_helps(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the text under each field, attribute and constant of a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        for field, text in itertools.pairwise(body if isinstance(body, list) else []):
            assigns = isinstance(field, (ast.Assign, ast.AnnAssign))
            if assigns and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                yield ast.unparse(field).splitlines()[0], str(text.value.value)


def test_the_help_of_a_field_stands_alone() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{name}: {text}"
        for path in SOURCES
        for name, text in field_helps(path)
        if HELP.match(text)
    ]
    assert not found


def test_sentences_of_the_pages_are_short() -> None:
    found = {str(path.relative_to(ROOT)): long_sentences(path.read_text(encoding="utf-8")) for path in PAGES}
    assert not {path: parts for path, parts in found.items() if parts}, f"at most {LIMIT} words in a sentence"


def test_a_long_sentence_would_be_found() -> None:
    long = "one " * LIMIT + "more."
    page = f"# {long}\n\n```\n{long}\n```\n\n| {long} |\n\n* Short. `{long}`\n* A [link]({long}) and\n  {long}\n"
    assert [words(part) for part in long_sentences(page)] == [LIMIT + 4]
    assert not long_sentences("a " * LIMIT + "\n\nb")
