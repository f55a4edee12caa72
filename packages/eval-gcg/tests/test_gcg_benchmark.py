"""`benchmarks/gcg.py` attacks in several processes, and its table compares what all schedules attacked."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the package is alone, without the repository")


@pytest.fixture
def schedules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gcg_schedules")


def record(name: str, goal: str, reached: list[float]) -> dict[str, Any]:
    return {
        "schedule": name, "goal": goal, "seed": 0, "reached": reached, "exact": reached[-1], "steps": 4, "candidates": 40,
    }  # fmt: skip


def test_the_table_is_over_what_every_schedule_attacked(schedules: Any) -> None:
    records = [
        record("gcg", "a", [3.0, 2.5, 2.0]),
        record("gcg", "b", [3.0, 2.5, 1.0]),
        record("gcg", "c", [9.0, 9.0, 9.0]),  # acg has not come to it
        record("acg", "b", [2.0, 1.5, 1.0]),
        record("acg", "a", [2.0, 1.5, 0.5]),
    ]
    options = argparse.Namespace(schedules=["gcg", "acg"], flops=1e9, dtype="float32")
    lines = schedules.table(records, options).splitlines()
    assert lines[0].startswith("Means over 2 attacks of 1.0e+09 operations")
    assert lines[4] == "| gcg | 3.000 | 2.500 | 1.500 | 1.000 ± 0.000 | 1.500 | 4 | 40 |"
    # 0.75 of 1.5; changes of -1.5 and 0 have a standard error of 0.75, half of 1.5
    assert lines[5] == "| acg | 2.000 | 1.500 | 0.750 | 0.500 ± 0.500 | 0.750 | 4 | 40 |"


def test_schedules_are_compared_in_processes_of_their_own(tmp_path: Path) -> None:
    words = "--model tiny --goals 2 --seeds 1 --flops 1e8 --width 8 --processes 2 --at-once 2 --minutes 9".split()
    command = [sys.executable, str(BENCHMARKS / "gcg.py"), *words, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "gcg.json").read_text())
    assert sorted((each["schedule"], each["seed"]) for each in records) == [("acg", 0)] * 2 + [("gcg", 0)] * 2
    for each in records:
        assert each["flops"] >= 1e8  # the step that goes beyond the budget is the last one
        assert each["reached"][-1] <= each["reached"][0] <= each["initial"]
    assert "Means over 2 attacks" in (tmp_path / "gcg.md").read_text()
    assert "Means over 2 attacks" in done.stdout
