"""Faults at moments that a seed draws, on a cluster of three logical nodes: every run ends as if nobody had disturbed it.

Sampling is seeded per completion and a step that comes again repeats its numbers, so the bound is rounding, not noise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs ray: pip install 'rlhf-distributed-ray[ray]'")
pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")

SCRIPT = Path(__file__).with_name("ray_chaos.py")


def disturbed(seeds: list[int], steps: int, faults: int, output: Path) -> list[dict[str, Any]]:
    words = ["--seeds", *map(str, seeds), "--steps", str(steps), "--faults", str(faults), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=400 * len(seeds)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seed"')]


@pytest.mark.parametrize(
    ("seeds", "steps", "faults"),
    [
        pytest.param([0, 3, 5], 6, 1, marks=pytest.mark.engines, id="short"),
        pytest.param([*range(20)], 60, 3, marks=pytest.mark.slow, id="long"),
    ],
)
def test_every_disturbed_run_has_the_numbers_and_rows_of_an_undisturbed_one(
    seeds: list[int], steps: int, faults: int, tmp_path: Path
) -> None:
    """Disturb three short runs per seed: one at an engine, one at a rank of the actor, and one at a node."""
    found = disturbed(seeds, steps, faults, tmp_path)
    assert [each["seed"] for each in found] == seeds
    for each in found:
        assert len(each["injected"]) == faults
        assert each["difference"] < 1e-4 and each["same_uids"], each
        assert each["roles"] == sum(fault["roles"] for fault in each["injected"]), each
        assert each["engines"] == sum(fault["engines"] for fault in each["injected"]), each
    assert {fault["what"].split()[0] for each in found for fault in each["injected"]} == {"engine", "actor", "node"}
