"""The documents agree with the repository. That their commands work is shown by running them: `nox -s docs`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rlhf_core
from rlhf_core.contract import hooks

ROOT = Path(__file__).resolve().parents[4]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("*/*/README.md"),
        *ROOT.glob("examples/plugins/*/README.md"),
    ]
)


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
    assert match[1] == (ROOT / "examples/plugins/reward-brevity" / name).read_text(encoding="utf-8")


def test_a_whole_plugin_is_about_thirty_lines() -> None:
    folder = ROOT / "examples/plugins/reward-brevity"
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


def test_the_readme_has_every_algorithm_once_in_its_table() -> None:
    table = README.partition("| algorithms | learn from |")[2].partition("\n\n")[0]
    names = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    plugin = (ROOT / "packages/algos/src/rlhf_algos/plugin.py").read_text(encoding="utf-8")
    provided = plugin.partition("def rlhf_algorithm()")[2].partition("\n\n\n")[0]
    known = re.findall(r'^\s+"(\w+)": ', provided, re.MULTILINE)
    assert sorted(names) == sorted(known), "add the algorithm to the table of algorithms in README.md"


ROOMS = ROOT / "packages" / "core" / "src" / "rlhf_core"
OF_OTHERS = ("CHANGELOG.md", "coming-from.md")
"""Pages with names of what is gone, or of other projects."""

PROSE = [*(path for path in DOCUMENTS if path.name not in OF_OTHERS), *sorted(ROOT.glob("packages/*/src/**/*.py"))]
FOLDERS = sorted(path.name for path in ROOMS.iterdir() if path.is_dir() and path.name != "__pycache__")
SCRIPTS = {  # names of all files
    path.name for folder in ("packages", "examples", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")
}
FILE = re.compile(rf"`((?:{'|'.join(FOLDERS)}|packages|benchmarks|docs|examples|tools)/[\w/-]*\.py|\w+\.py)`")
MODULE = re.compile(
    rf"`(?:rlhf_core\.)?((?:{'|'.join(set(FOLDERS) - {'data', 'run', 'reward', 'config'})})(?:\.(?!py`)\w+)+)`"
)


def missing_places(text: str) -> list[str]:
    """Return the files and modules that a text names between backticks and that core does not have."""
    found = []
    for name in FILE.findall(text):
        known = (ROOMS / name).exists() or (ROOT / name).exists() or ("/" not in name and name in SCRIPTS)
        if not known and f"<!-- file: {name} -->" not in text:  # a file that the page writes
            found.append(name)
    for name in MODULE.findall(text):
        parts = name.split(".")
        places = [ROOMS.joinpath(*parts[:k]) for k in range(2, len(parts) + 1)]
        public = parts[1] in (ROOMS / parts[0] / "__init__.py").read_text("utf-8")
        if not public and not any(place.with_suffix(".py").exists() or place.is_dir() for place in places):
            found.append(name)
    return found


def test_files_and_modules_that_prose_names_exist() -> None:
    found = {str(path.relative_to(ROOT)): missing_places(path.read_text("utf-8")) for path in PROSE}
    assert not {path: names for path, names in found.items() if names}


def test_a_place_that_is_gone_is_seen() -> None:
    text = "`models/packed.py`, `models.average`, `training.reduction.Means`, `loop.py` and `training/credit.py`"
    assert missing_places(text) == ["models/packed.py", "models.average"]


def test_every_public_name_has_a_place_in_the_table_of_hooks_md() -> None:
    section = (
        (ROOT / "docs" / "hooks.md")
        .read_text(encoding="utf-8")
        .partition("\n## Public names\n")[2]
        .partition("\n## ")[0]
    )
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| for |")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|", 2)[2])}
    public = set(rlhf_core.__all__)
    assert not public - listed, "add them to the table `Public names` of docs/hooks.md"
    assert not [name for name in listed - public if name[0].isupper()]


SLIME = """
--rollout-function-path --custom-generate-function-path --custom-rm-path --dynamic-sampling-filter-path --buffer-filter-path
--rollout-sample-filter-path --rollout-all-samples-process-path --rollout-data-postprocess-path --custom-loss-function-path
--custom-tis-function-path --custom-pg-loss-reducer-function-path --custom-reward-post-process-path
--custom-convert-samples-to-train-data-path --custom-rollout-log-function-path --custom-eval-rollout-log-function-path
--data-source-path --eval-function-path --custom-megatron-init-path --custom-megatron-before-log-prob-hook-path
--custom-megatron-before-train-step-hook-path
""".split()
"""The interfaces that slime's page lists, in its order."""


def sections(page: str) -> dict[str, list[list[str]]]:
    """Return the cells of the table rows of a page of docs by their heading, the header left out."""
    found: dict[str, list[list[str]]] = {}
    for part in (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n## ")[1:]:
        rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")][2:]
        found[part.splitlines()[0]] = [[cell.strip() for cell in row] for row in rows]
    return found


def kinds_and_hooks(text: str) -> tuple[set[str], set[str]]:
    """Return what a text calls a kind and a hook."""
    return set(re.findall(r"[Kk]ind `(\w+)`", text)), set(re.findall(r"[Hh]ook `(\w+)`", text))


def test_each_interface_of_slime_is_a_kind_a_hook_or_a_no_with_its_reason() -> None:
    rows = sections("customizing.md")["The 20 interfaces of slime"]
    assert [row[1].strip("`") for row in rows] == SLIME
    assert [row[0] for row in rows] == [str(i) for i in range(1, 21)]
    for number, _, _, answer in rows:
        refused = answer.startswith("**no**")
        assert refused or any(kinds_and_hooks(answer)), f"row {number} names neither a kind nor a hook"
        assert not refused or len(answer.split()) > 12, f"row {number} gives no reason"


def test_the_page_on_customizing_names_every_kind_and_hook_and_no_other() -> None:
    text = (ROOT / "docs" / "customizing.md").read_text(encoding="utf-8")
    kinds, called = kinds_and_hooks(text)
    assert kinds == set(hooks.KINDS)
    assert called == {*hooks.OBSERVERS, hooks.METRICS}


def test_the_page_on_customizing_lists_every_example_package_with_its_kind() -> None:
    rows = sections("customizing.md")["Worked examples"]
    listed = {re.findall(r"\[([\w-]+)\]", package)[0]: kind.strip("`") for package, kind, _ in rows}
    folders = {path.parent.name for path in ROOT.glob("examples/plugins/*/pyproject.toml")} - {"reward-brevity"}
    assert set(listed) == folders, "brevity is in the README; each other package has its row"
    for name, kind in listed.items():
        sources = "".join(
            path.read_text(encoding="utf-8") for path in (ROOT / "examples/plugins" / name).glob("src/*/*.py")
        )
        assert f"def rlhf_{kind}(" in sources


def test_a_word_that_is_no_kind_would_be_seen() -> None:
    assert kinds_and_hooks("kind `stepper`, Kind `loss`; hook `rlhf_never`") == ({"stepper", "loss"}, {"rlhf_never"})
