"""rlhf-eval-gcg is listed, imports nothing heavy, and says what to do when chosen."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from rlhf_core.errors import UsageError
from rlhf_eval_gcg import plugin
from rlhf_eval_gcg.gcg import GCG


def test_its_entry_point_names_the_plugin_module() -> None:
    (entry,) = entry_points(group="rlhf", name="gcg")
    assert entry.load() is plugin


def test_it_registers_its_name() -> None:
    assert plugin.rlhf_evaluator() == {"gcg": f"{GCG.__module__}:GCG"}


def test_importing_it_does_not_import_torch() -> None:
    heavy = {"torch", "transformers"}
    code = "import sys, rlhf_eval_gcg.plugin, rlhf_eval_gcg.gcg; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert heavy.isdisjoint(imported.split())


def test_choosing_it_says_that_it_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="not part of version"):
        GCG()()
