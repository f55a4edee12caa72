"""rlhf-strategy-deepspeed is listed, imports nothing heavy, and says what to do when chosen."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from rlhf_core.errors import MissingPackage, UsageError
from rlhf_strategy_deepspeed import plugin
from rlhf_strategy_deepspeed.strategy import DeepSpeed


def test_its_entry_point_names_the_plugin_module() -> None:
    (entry,) = entry_points(group="rlhf", name="deepspeed")
    assert entry.load() is plugin


def test_it_registers_its_name() -> None:
    assert plugin.rlhf_strategy() == {"deepspeed": f"{DeepSpeed.__module__}:DeepSpeed"}


def test_importing_it_does_not_import_torch_or_deepspeed() -> None:
    heavy = {"torch", "transformers", "deepspeed"}
    code = "import sys, rlhf_strategy_deepspeed.plugin, rlhf_strategy_deepspeed.strategy; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert heavy.isdisjoint(imported.split())


def test_choosing_it_says_in_one_line_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_strategy_deepspeed.strategy.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'rlhf-strategy-deepspeed\[deepspeed\]'"):
        DeepSpeed()()


def test_choosing_it_says_that_it_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_strategy_deepspeed.strategy.find_spec", lambda name: object())
    with pytest.raises(UsageError, match="not part of version"):
        DeepSpeed()()
