"""Plugins that the tests of the registry make: installed distributions, and objects with hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_core.contract.hooks import hookimpl
from rlhf_core.contract.providers import Reward

__all__ = ["GOOD", "Fake", "Install", "install", "plugin"]

Install = Callable[..., None]

GOOD = '''
from dataclasses import dataclass
from rlhf_core import Reward, hookimpl

@dataclass(frozen=True)
class Terse(Reward):
    """Likes few words. Really."""

    def __call__(self, rollouts):
        return []

@hookimpl
def rlhf_reward():
    return {"terse": Terse}
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution on the path as an installer would: metadata, entry point, module. Module names are unique."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(dist: str, source: str, entry: str = "", version: str = "1.0") -> None:
        module = dist.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[rlhf]\n{entry or module} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return add


@dataclass(frozen=True)
class Fake(Reward):
    """A provider that does nothing."""

    def __call__(self, rollouts: Any) -> Any: ...


def plugin(**tables: dict[str, Any]) -> Any:
    """A plugin object with one hook per keyword."""

    def hook(name: str, table: dict[str, Any]) -> Any:
        def function() -> dict[str, Any]:
            return table

        function.__name__ = name
        return hookimpl(function)

    return SimpleNamespace(**{f"rlhf_{kind}": hook(f"rlhf_{kind}", table) for kind, table in tables.items()})
