"""The site has every page in its place, and its generated reference has every name of the contract.

That the site builds without a dead link is shown by building it: `nox -s site`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import rlhf_core
from rlhf_core.contract.hooks import KINDS
from rlhf_core.plugins.registry import Registry

ROOT = Path(__file__).resolve().parents[4]
DOCS = ROOT / "docs"
NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
KINDS_OF_PAGES = ["Start", "Tutorials", "How-to", "Reference", "Explanation", "Reports"]


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """The generated pages of the reference."""
    sys.path.insert(0, str(ROOT / "tools"))
    import site_reference

    return site_reference.pages()


def listed_pages() -> list[str]:
    """Return the pages of the nav in their order."""
    return re.findall(r": (\S+\.md)$", NAV, re.MULTILINE)


def test_the_nav_keeps_the_kinds_of_pages_apart() -> None:
    assert re.findall(r"^  - ([\w-]+):", NAV, re.MULTILINE) == KINDS_OF_PAGES


def test_every_page_of_docs_is_once_in_the_nav() -> None:
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    listed = listed_pages()
    assert not pages - set(listed), "add the page to the nav of mkdocs.yml, under its kind"
    assert len(listed) == len(set(listed))


def test_every_page_in_the_nav_is_written_or_generated(reference: dict[str, str]) -> None:
    known = {"index.md", *reference, *(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))}
    assert not [page for page in listed_pages() if page not in known]
    assert not [page for page in reference if page not in listed_pages()]


def test_the_reference_has_every_public_name_hook_and_provider(reference: dict[str, str]) -> None:
    names = set(re.findall(r"^## `(\w+)`$", reference["reference/public-names.md"], re.MULTILINE))
    assert names == set(rlhf_core.__all__)
    hooks = set(re.findall(r"^## `rlhf_(\w+)`$", reference["reference/hook-specs.md"], re.MULTILINE))
    assert hooks > set(KINDS)
    registry = Registry()
    for kind in KINDS:
        page = reference[f"reference/providers/{kind}.md"]
        assert re.findall(r"^## `(\w+|[\w-]+)`$", page, re.MULTILINE) == list(registry.table(kind))


def test_the_options_of_a_provider_stand_with_type_default_and_meaning(reference: dict[str, str]) -> None:
    page = reference["reference/providers/reward.md"].partition("## `length`")[2].partition("\n## ")[0]
    assert "| `target` | `INT` | 32 | target length, in `unit` |" in page


@pytest.mark.parametrize(
    ("folder", "text", "page", "shown"),
    [
        ("", "[a](docs/data.md#images)", "index.md", "[a](data.md#images)"),
        ("docs", "[a](../README.md)", "data.md", "[a](index.md)"),
        ("docs", "[a](hooks.md)", "tutorials/x.md", "[a](../hooks.md)"),
        ("docs", "[a](../packages/core)", "data.md", "[a](repository/packages/core/README.md)"),
        ("docs", "[a](../noxfile.py)", "data.md", "[a](repository/noxfile.py.md)"),
        ("docs", "[a](https://example.org/x) [b](#c)", "data.md", "[a](https://example.org/x) [b](#c)"),
        ("docs", "```python\nf[0](x)\n```", "data.md", "```python\nf[0](x)\n```"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(folder: str, text: str, page: str, shown: str) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import site_hooks

    assert site_hooks._relative(site_hooks._absolute(text, ROOT / folder), page) == shown
