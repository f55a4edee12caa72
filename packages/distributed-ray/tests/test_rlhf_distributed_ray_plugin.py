"""rlhf-distributed-ray is listed, imports nothing heavy, and says what to do when chosen."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from rlhf_core.errors import MissingPackage
from rlhf_core.testing import tiny_run
from rlhf_distributed_ray import plugin
from rlhf_distributed_ray.dashboard import RayDashboard
from rlhf_distributed_ray.launcher import RayLauncher

TINY = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm"


def test_its_entry_point_names_the_plugin_module() -> None:
    (entry,) = entry_points(group="rlhf", name="ray")
    assert entry.load() is plugin


def test_it_registers_its_names() -> None:
    assert plugin.rlhf_launcher() == {"ray": f"{RayLauncher.__module__}:RayLauncher"}
    assert plugin.rlhf_observer() == {"ray_dashboard": f"{RayDashboard.__module__}:RayDashboard"}


def test_importing_it_does_not_import_torch_or_ray() -> None:
    heavy = {"torch", "transformers", "ray"}
    code = "import sys, rlhf_distributed_ray.plugin, rlhf_distributed_ray.launcher; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert heavy.isdisjoint(imported.split())


@pytest.mark.parametrize("words", [["plugins"], [TINY, "--launcher", "ray", "--help"]])
def test_listing_it_and_showing_its_options_on_the_command_line_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys\nfrom rlhf_core.cli import main\nassert main({words!r}) == 0\nprint('MODULES', *sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    said, _, modules = printed.rpartition("MODULES")
    assert "ray" in said
    assert {"torch", "transformers", "ray"}.isdisjoint(modules.split())


def test_choosing_it_says_in_one_line_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_distributed_ray.launcher.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'rlhf-distributed-ray\[ray\]'"):
        RayLauncher().check()


def test_it_is_missed_before_any_model_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rlhf_distributed_ray.launcher.find_spec", lambda name: None)
    with pytest.raises(MissingPackage):
        tiny_run(tmp_path / "run", launcher=RayLauncher()).train()
    assert not (tmp_path / "run").exists()


def test_one_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_distributed_ray.launcher.find_spec", lambda name: object())
    monkeypatch.setattr("rlhf_distributed_ray.launcher.version", lambda name: "2.9.3")
    with pytest.raises(MissingPackage, match=r"^ray 2\.9 is too old: .* 'rlhf-distributed-ray\[ray\]'$"):
        RayLauncher().check()
    monkeypatch.setattr("rlhf_distributed_ray.launcher.version", lambda name: "3.0.0.dev0")
    RayLauncher().check()
