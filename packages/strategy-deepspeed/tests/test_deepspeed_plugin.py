"""rlhf-strategy-deepspeed is listed, imports nothing heavy, and refuses in one line what cannot work."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import make_config
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.providers import Launcher
from rlhf_core.contract.roles import Placement
from rlhf_core.errors import MissingPackage, UsageError
from rlhf_core.forecast.forecast import forecast
from rlhf_core.forecast.options import PlanOptions
from rlhf_core.testing import tiny_run
from rlhf_core.training.planner import make_plan
from rlhf_strategy_deepspeed import plugin, strategy
from rlhf_strategy_deepspeed.strategy import DeepSpeed

TINY = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm"


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


@pytest.mark.parametrize("words", [["plugins"], [TINY, "--strategy", "deepspeed", "--help"]])
def test_listing_it_and_showing_its_options_on_the_command_line_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys\nfrom rlhf_core.cli import main\nassert main({words!r}) == 0\nprint('MODULES', *sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    said, _, modules = printed.rpartition("MODULES")
    assert "deepspeed" in said
    assert {"torch", "transformers", "deepspeed"}.isdisjoint(modules.split())


def test_choosing_it_says_in_one_line_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'rlhf-strategy-deepspeed\[deepspeed\]'"):
        DeepSpeed().check()


def test_it_is_missed_before_any_model_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(strategy, "find_spec", lambda name: None)
    monkeypatch.setattr("rlhf_core.training.local_role._build", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(MissingPackage):
        tiny_run(tmp_path / "run", strategy=DeepSpeed()).train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("found", ["0.18.2", "0.9.0+cu128"])
def test_a_library_without_what_we_rely_on_is_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 0.19.8 the setting that stops DeepSpeed from counting micro-batches is unknown and silently ignored."""
    monkeypatch.setattr(strategy, "find_spec", lambda name: object())
    monkeypatch.setattr(strategy, "version", lambda name: found)
    short = re.escape(found.split("+")[0])
    with pytest.raises(MissingPackage, match=rf"^deepspeed {short} is too old: .* 'deepspeed>=0\.19\.8'$"):
        DeepSpeed().check()


@pytest.mark.parametrize("found", ["0.19.8", "0.20.0+unknown", "1.0"])
def test_newer_ones_will_do(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "find_spec", lambda name: object())
    monkeypatch.setattr(strategy, "version", lambda name: found)
    DeepSpeed().check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 1, "overlap": True}, "overlap needs stage 2 or 3, not 1"),
        ({"bucket": 0}, "bucket must be at least 1, not 0"),
        ({"persist": -1}, "persist must be at least 1, not -1"),
        ({"stage": 2, "persist": 8}, "persist needs stage 3, which shards weights, not 2; leave it out"),
        ({"stage": 0, "bucket": 8}, "bucket needs stage 1, 2 or 3, not 0, where DeepSpeed sets the size; leave it out"),
        ({"stage": 3, "hpz": 1}, "hpz must be at least 2, not 1"),
        ({"stage": 2, "hpz": 2}, "hpz needs stage 3, which shards weights, not 2; leave it out"),
        ({"stage": 2, "leaf_modules": ("Experts",)}, "leaf_modules needs stage 3, which shards weights, not 2"),
        ({"stage": 0, "offload": "optimizer"}, "offload optimizer needs stage 1, 2 or 3, not 0"),
        ({"stage": 2, "offload": "all"}, "offload all needs stage 3, not 2"),
        ({"sequence": 0}, "sequence must be at least 1, not 0"),
        ({"sequence_kind": "ring"}, "sequence_kind ring needs ranks that share rows; set sequence to 2 or more"),
        ({"tensor": 0}, "tensor must be at least 1, not 0"),
        ({"tensor": 2, "sequence": 2}, "tensor 2 does not go together with sequence 2; leave one out"),
        ({"tensor": 2, "stage": 3}, "tensor 2 needs stage 0, 1 or 2, not 3, which shards every weight already"),
        ({"cpu_adam": True}, "cpu_adam updates weights in main memory; choose an offload too"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DeepSpeed(**options)


@dataclass(frozen=True)
class Apart(Launcher):
    """A launcher whose roles are in processes of their own."""

    def __call__(self, plan: Plan) -> Placement:
        raise AssertionError("the plan is refused before")


def test_ranks_that_share_rows_need_a_launcher_of_one_process() -> None:
    for sharing in (DeepSpeed(sequence=2), DeepSpeed(tensor=2)):
        config = make_config(TINY, model="tiny", strategy=sharing, launcher=Apart())
        with pytest.raises(
            UsageError, match="the launcher Apart gives each rank separate rows, but with this strategy several"
        ):
            make_plan(config)


def test_a_plan_needs_whole_groups_of_devices() -> None:
    for sharing in (DeepSpeed(sequence=2), DeepSpeed(tensor=2)):
        config = make_config(TINY, model="tiny", strategy=sharing)
        with pytest.raises(
            UsageError, match="3: devices cannot form groups of 2 that share rows; pass a multiple of 2$"
        ):
            forecast(config, PlanOptions(gpus=3))
        assert forecast(config, PlanOptions(gpus=4)).roles["actor"].memory.weights > 0


def test_an_unknown_stage_is_one_line_and_exit_code_2() -> None:
    words = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--strategy", "deepspeed", "--strategy.stage", "4"]
    done = subprocess.run([sys.executable, "-m", "rlhf_core", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--strategy.stage" in done.stderr
    assert "{0,1,2,3}" in done.stderr
