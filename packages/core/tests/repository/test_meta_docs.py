"""The documents agree with the repository. That their commands work is shown by running them: `nox -s docs`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*/README.md")])


@pytest.mark.parametrize("session", ["demo", "tests"])
def test_the_first_screen_shows_the_two_commands(session: str) -> None:
    first_screen = "\n".join(README.splitlines()[:25])
    assert f"$ python3 -m pip install nox && python3 -m nox -s {session}" in first_screen


def test_ci_runs_the_test_command_of_the_readme_literally() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "python3 -m pip install nox && python3 -m nox -s tests\n" in ci
    assert all(session in ci for session in ("lint", "types", "alone", "thirdparty"))


@pytest.mark.parametrize("name", ["pyproject.toml", "rlhf_brevity.py"])
def test_the_plugin_in_the_readme_is_the_one_that_is_installed(name: str) -> None:
    match = re.search(rf"`{re.escape(name)}`\n\n```\w+\n(.*?)```", README, re.DOTALL)
    assert match is not None
    assert match[1] == (ROOT / "examples" / "plugin" / name).read_text(encoding="utf-8")


def test_a_whole_plugin_is_about_thirty_lines() -> None:
    folder = ROOT / "examples" / "plugin"
    files = [folder / "pyproject.toml", folder / "rlhf_brevity.py"]
    assert sum(bool(line.strip()) for file in files for line in file.read_text(encoding="utf-8").splitlines()) <= 30


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert not [link for link in links if not (document.parent / link).exists()]


@pytest.mark.parametrize(
    "package", sorted(path.parent for path in ROOT.glob("packages/*/README.md")), ids=lambda p: p.name
)
def test_the_readme_of_a_package_names_everything_that_it_provides(package: Path) -> None:
    (plugin,) = package.glob("src/*/plugin.py")
    names = re.findall(r'^\s+(?:return \{)?"([\w.-]+)": "[\w.]+:\w+"', plugin.read_text(encoding="utf-8"), re.MULTILINE)
    readme = (package / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((\S+/docs/\S+\.md)\)", readme)
    text = "\n".join([readme, *((package / link).read_text(encoding="utf-8") for link in linked)])
    assert names
    assert not [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)]
