"""Hooks of MkDocs for the site (`nox -s site`): the README as index, generated reference, and files outside of docs/.

A page of docs/ may link to a file or folder of the repository, as it may on GitHub. Such a target becomes a page of its own
under `repository/`: a README as it is, other files as text, a folder as a list. So every link stays inside of the site.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

from site_reference import pages  # MkDocs loads this file by its path

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml"}
INDEX = "index.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, the generated reference, and what pages link to outside of docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    texts = {INDEX: _page(ROOT / "README.md"), **pages()}
    waiting = [*texts.values(), *(_page(Path(file.abs_src_path)) for file in files.documentation_pages())]
    while waiting:
        for target in _outside(waiting.pop()):
            name = _name(target)
            if name not in texts:
                texts[name] = _page(target)
                waiting.append(texts[name])
    for name, text in texts.items():
        level = InclusionLevel.NOT_IN_NAV if name.startswith("repository/") else InclusionLevel.INCLUDED
        files.append(File.generated(config, name, content=_relative(text, name), inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn the links of a page of docs/ into links between pages of the site."""
    if page.file.generated_by is not None:
        return markdown
    return _relative(_absolute(markdown, Path(page.file.abs_src_path).parent), page.file.src_uri)


def _page(path: Path) -> str:
    """Return the Markdown of a file or folder, its links as absolute paths."""
    if path.is_dir():
        readme = path / "README.md"
        if readme.exists():
            return _page(readme)
        shown = sorted(each for each in path.iterdir() if not each.name.startswith((".", "__")))
        rows = "".join(f"- [{each.name}]({each})\n" for each in shown)
        return f"# {path.relative_to(ROOT)}\n\n{rows}"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return _absolute(text, path.parent)
    return f"# {path.name}\n\n`{path.relative_to(ROOT)}`\n\n~~~~{LANGUAGES.get(path.suffix, 'text')}\n{text}\n~~~~\n"


def _absolute(text: str, folder: Path) -> str:
    """Make the links of a page absolute paths of this machine, and let Markdown into `<details>`."""
    text = text.replace("<details>", '<details markdown="1">')
    return _outside_fences(text, lambda match: os.path.normpath(folder / match[1]))


def _relative(text: str, page: str) -> str:
    """Make absolute links relative to a page of the site."""
    folder = Path(page).parent
    return _outside_fences(text, lambda match: os.path.relpath(_name(Path(match[1])), folder))


def _outside_fences(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Replace the links of a page, and leave fenced code as it is."""
    at, parts = 0, []
    for fence in FENCED.finditer(text):
        parts += [LINK.sub(replace, text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, LINK.sub(replace, text[at:])])


def _outside(text: str) -> list[Path]:
    """Return the targets of a page's absolute links that are no files of docs/, and exist."""
    found = [Path(match[1]) for match in LINK.finditer(FENCED.sub("", text))]
    return [each for each in found if each.is_absolute() and each.exists() and _name(each).startswith("repository/")]


def _name(path: Path) -> str:
    """Return the place of an absolute path in the site."""
    if path in (ROOT / "README.md", ROOT):
        return INDEX
    if path.is_relative_to(DOCS) and not path.is_dir():
        return str(path.relative_to(DOCS))
    if not path.is_relative_to(ROOT):
        return str(path)
    name = f"repository/{path.relative_to(ROOT)}"
    if path.is_dir():
        return f"{name}/README.md"
    return name if path.suffix == ".md" else f"{name}.md"
