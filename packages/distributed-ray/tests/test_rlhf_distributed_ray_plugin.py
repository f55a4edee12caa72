"""rlhf-distributed-ray is listed, imports nothing heavy, and says what to do when chosen."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from rlhf_core.errors import MissingPackage
from rlhf_distributed_ray import plugin
from rlhf_distributed_ray.launcher import RayLauncher


def test_its_entry_point_names_the_plugin_module() -> None:
    (entry,) = entry_points(group="rlhf", name="ray")
    assert entry.load() is plugin


def test_it_registers_its_name() -> None:
    assert plugin.rlhf_launcher() == {"ray": f"{RayLauncher.__module__}:RayLauncher"}


def test_importing_it_does_not_import_torch_or_ray() -> None:
    heavy = {"torch", "transformers", "ray"}
    code = "import sys, rlhf_distributed_ray.plugin, rlhf_distributed_ray.launcher; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert heavy.isdisjoint(imported.split())


def test_choosing_it_says_in_one_line_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_distributed_ray.launcher.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'rlhf-distributed-ray\[ray\]'"):
        RayLauncher().check()
