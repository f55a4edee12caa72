"""Docstrings open with a verb or a name, and sentences of finished pages stay short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
PAGES = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "packages/*/README.md")
    for path in ROOT.glob(pattern)
)

LIMIT = 25
"""words of a sentence; code between backticks is one word"""

TO_DO = frozenset(
    {
        "docs/architecture.md",
        "docs/asynchronous.md",
        "docs/benchmarks.md",
        "docs/comparison.md",
        "docs/fsdp.md",
        "docs/gcg.md",
        "docs/generate-score-eval.md",
        "docs/gpu.md",
        "docs/hooks.md",
        "docs/metrics.md",
        "docs/models.md",
        "docs/multi-node.md",
        "docs/one_pass_rm.md",
        "docs/optimizers.md",
        "docs/planning.md",
        "docs/python.md",
        "docs/real-runs.md",
        "docs/recipes.md",
        "docs/reports/gpu-h200.md",
        "docs/repulse.md",
        "docs/sweeps.md",
        "docs/writing-a-plugin.md",
    }
)
"""Pages that still have longer sentences. Rewrite a page, then remove it here; add none."""

OPENING = re.compile(r"(What|Whether|How|Where|Who|When|Why|Which)\b")
OPENINGS_ALLOWED: frozenset[str] = frozenset()
"""Docstrings that may open so, as `path:name`; fewer than ten."""


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
        for path in SOURCES
        for name, text in docstrings(path)
        if OPENING.match(text) and f"{path.relative_to(ROOT)}:{name}" not in OPENINGS_ALLOWED
    ]
    assert not found
    assert len(OPENINGS_ALLOWED) < 10


def test_sentences_of_finished_pages_are_short() -> None:
    found = {
        str(path.relative_to(ROOT)): long_sentences(path.read_text(encoding="utf-8"))
        for path in PAGES
        if str(path.relative_to(ROOT)) not in TO_DO
    }
    assert not {path: parts for path, parts in found.items() if parts}


def test_pages_to_do_exist_and_still_have_long_sentences() -> None:
    done = [path for path in sorted(TO_DO) if not long_sentences((ROOT / path).read_text(encoding="utf-8"))]
    assert not done, "remove them from TO_DO"
