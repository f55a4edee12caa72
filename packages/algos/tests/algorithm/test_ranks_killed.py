"""Two ranks, both killed without a word and resumed, leave what two undisturbed ranks leave, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from killed_child import train_ranks

from rlhf_core.testing import run_ranks

STEPS = 3
OPTIONS: dict[str, Any] = {
    "algorithm": "ppo",
    "model": "tiny:hidden=8,layers=1",
    "reward": "length",
    "sampling": {"n": 1, "max_new_tokens": 4},
    "batch_size": 4,
    "minibatches": 2,
    "steps": STEPS,
    "save_every": 1,
    "actor": {"optim": {"lr": 1e-2}},
}


def run(output: Path, **more: Any) -> list[int]:
    """The exit codes of two ranks."""
    done = run_ranks(2, train_ranks, OPTIONS | {"output": str(output)}, *more.values())
    return [rank.code for rank in done]


def left_by(output: Path) -> dict[str, Any]:
    """Return the files of a run without times."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    told_of_time = ("time/", "speed/", "memory/")
    return {
        "metrics": [{name: value for name, value in row.items() if not name.startswith(told_of_time)} for row in rows],
        "samples": (output / "samples.jsonl").read_bytes(),
        "weights": {path.name: path.read_bytes() for path in (output / "model").glob("*.safetensors")},
        "checkpoints": sorted(path.name for path in (output / "checkpoints").iterdir()),
    }


@pytest.mark.slow
def test_two_ranks_that_are_both_killed_and_resumed_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole) == [0, 0]
    assert run(cut, kill_in_step=2) == [-9, -9]
    assert (cut / ".run-lock").exists()
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step-1"]
    assert run(cut, kill_in_step=3) == [-9, -9]
    assert run(cut) == [0, 0]
    assert left_by(cut) == left_by(whole)
    assert left_by(whole)["weights"]
