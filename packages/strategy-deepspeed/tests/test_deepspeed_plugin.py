"""rlhf-strategy-deepspeed is listed, imports nothing heavy, and refuses in one line what cannot work."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core.errors import MissingPackage, UsageError
from rlhf_strategy_deepspeed import engine, plugin
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
        DeepSpeed()(torch.nn.Module, None, 1)


def test_a_library_without_what_we_rely_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 0.19.8 the setting that stops DeepSpeed from counting micro-batches is unknown and silently ignored."""
    old = SimpleNamespace(__version__="0.18.2", DeepSpeedEngine=object)
    monkeypatch.setitem(sys.modules, "deepspeed", old)
    with pytest.raises(MissingPackage, match=r"0\.18\.2 is too old: .* 'deepspeed>=0\.19\.8'"):
        engine.library()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 1, "overlap": True}, "overlap needs stage 2 or 3, not 1"),
        ({"bucket": 0}, "bucket must be at least 1, not 0"),
        ({"persist": -1}, "persist must be at least 1, not -1"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DeepSpeed(**options)


def test_an_unknown_stage_is_one_line_and_exit_code_2() -> None:
    words = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--strategy", "deepspeed", "--strategy.stage", "4"]
    done = subprocess.run([sys.executable, "-m", "rlhf_core", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--strategy.stage" in done.stderr
    assert "{0,1,2,3}" in done.stderr
