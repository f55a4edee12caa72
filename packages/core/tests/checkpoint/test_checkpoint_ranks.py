"""A run may go on with another number of processes: the strategy `torch` replicates, so every rank restores the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from rlhf_core.cli import main
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import RewardOutput
from rlhf_core.testing import run_ranks


@dataclass(frozen=True)
class Uncoupled(Advantage):
    """The reward alone: what other rows a rank holds changes nothing."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.where(rollouts.mask_NT, 0.5 + rewards.rewards_N[:, None], 0.0)


WORDS = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--model", "tiny:hidden=16,layers=1", "--batch-size", "4"]
WORDS += [
    "--advantage",
    f"{Path(__file__).stem}:Uncoupled",
    "--sampling.max-new-tokens",
    "6",
    "--actor.optim.lr",
    "1e-2",
]


def run(ranks: int, output: Path, *flags: str) -> None:
    """The command on one process, here, or on several ranks."""
    words = [*WORDS, "--output", str(output), *flags]
    if ranks == 1:
        assert main(words) == 0
        return
    done = run_ranks(ranks, main, words)
    assert not any(rank.code for rank in done), done[-1].stderr[-3000:]


def curve(output: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss/actor"], row["reward/mean"]) for row in rows]


@pytest.mark.parametrize(("first", "then", "flags"), [(2, 1, ["--save-async"]), (1, 2, [])], ids=["fewer", "more"])
def test_a_run_goes_on_with_another_number_of_ranks(first: int, then: int, flags: list[str], tmp_path: Path) -> None:
    run(1, tmp_path / "straight", "--steps", "4")
    run(first, tmp_path / "run", "--steps", "2", *flags)
    run(then, tmp_path / "run", "--steps", "4", "--resume", *flags)
    straight, found = curve(tmp_path / "straight"), curve(tmp_path / "run")
    assert [step for step, *_ in found] == [1, 2, 3, 4]
    for expected, got in zip(straight, found, strict=True):
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)  # float32 summed in another order
    assert straight[0][1] != pytest.approx(straight[-1][1], rel=1e-2), "and something was learnt"
