"""rlhf-eval-gcg registers what exists, imports nothing heavy, and documents its metrics."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points

import pytest

from rlhf_eval_gcg import plugin
from rlhf_eval_gcg.gcg import GCG

PROVIDERS = {
    kind: hook()
    for kind, hook in {
        "command": plugin.rlhf_command,
        "evaluator": plugin.rlhf_evaluator,
        "reward": plugin.rlhf_reward,
    }.items()
}


def test_its_entry_point_names_the_plugin_module() -> None:
    (entry,) = entry_points(group="rlhf", name="gcg")
    assert entry.load() is plugin


def test_the_evaluator_is_registered() -> None:
    assert PROVIDERS["evaluator"] == {"gcg": f"{GCG.__module__}:GCG"}


@pytest.mark.parametrize("path", [path for several in PROVIDERS.values() for path in several.values()])
def test_every_registered_provider_exists(path: str) -> None:
    module, _, name = str(path).partition(":")
    assert getattr(import_module(module), name).__doc__


def test_importing_it_does_not_import_torch() -> None:
    heavy = {"torch", "transformers", "datasets", "pyarrow", "matplotlib"}
    modules = "rlhf_eval_gcg.plugin, rlhf_eval_gcg.gcg, rlhf_eval_gcg.analysis.report, rlhf_eval_gcg.judges.verdict"
    code = f"import sys, {modules}; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert heavy.isdisjoint(imported.split())
