"""`new-plugin --kind K` writes a package that works, for every kind: typed, listed, public imports only, tests that pass."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("rlhf_algos", reason="the packages run algorithms of rlhf-algos")

from test_examples import private_imports

from rlhf_core.cli import main
from rlhf_core.contract.hooks import KINDS
from rlhf_core.testing import run_ranks


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A package of every kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")
    for kind in KINDS:
        assert main(["new-plugin", f"my-{kind}", "--kind", kind]) == 0
    return [Path(f"rlhf-my-{kind}") for kind in KINDS]


def test_a_new_plugin_of_any_kind_is_a_package_with_public_imports(packages: list[Path]) -> None:
    for kind, folder in zip(KINDS, packages, strict=True):
        module = f"rlhf_my_{kind}"
        assert {path.name for path in folder.iterdir()} == {
            *("README.md", "pyproject.toml", f"{module}.py", f"test_{module}.py")
        }
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["entry-points"]["rlhf"] == {f"my_{kind}": module}
        texts = {path.name: path.read_text() for path in folder.iterdir()}
        assert "$" not in "".join(texts.values()), "everything is filled in"
        for name in (f"{module}.py", f"test_{module}.py"):
            assert not list(private_imports(ast.parse(texts[name]), {module})), name


def test_a_new_plugin_of_any_kind_is_listed_and_passes_its_own_test(
    packages: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*(str(folder.resolve()) for folder in packages), *sys.path])
    load = [word for kind in KINDS for word in ("-p", f"rlhf_my_{kind}")]
    capsys.readouterr()
    assert main([*load, "plugins"]) == 0
    listed = capsys.readouterr().out
    assert not [kind for kind in KINDS if not re.search(rf"^{kind} +my_{kind}\w* +\(local\) +\S", listed, re.MULTILINE)]
    (done,) = run_ranks(1, pytest.main, ["-q", "-p", "no:cacheprovider", *map(str, packages)])
    assert f"{len(KINDS)} passed" in done.stdout, done.stdout
