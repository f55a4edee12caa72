"""Non-finite numbers on one rank stop all ranks, or are skipped by all, so that ranks neither hang nor diverge."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from rlhf_core.cli import main
from rlhf_core.contract.batch import Batch
from rlhf_core.contract.providers import Loss, Reward
from rlhf_core.contract.results import LossTerms, Reduction, RewardOutput
from rlhf_core.testing import RankResult, run_ranks
from rlhf_core.testing.tiny_algorithm import TinyLoss

WORDS = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--model", "tiny:hidden=16,layers=1", "--batch-size", "4"]
WORDS += [
    "--advantage",
    "test_checkpoint_ranks:Uncoupled",
    "--steps",
    "4",
    "--sampling.max-new-tokens",
    "6",
    "--actor.optim.lr",
    "1e-2",
]


def last_rank() -> bool:
    """Return True on the last rank, or in a single process."""
    alone = not torch.distributed.is_initialized()
    return alone or torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


@dataclass(frozen=True)
class BrokenLoss(Loss):
    """A loss that is nan at the second step, on the last rank; its gradient alone would be finite."""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})

    def __call__(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> LossTerms:
        values_NT = TinyLoss()(outputs, batch).values
        broken = batch.step.number == 2 and last_rank()
        return LossTerms(values_NT + math.nan if broken else values_NT, Reduction("token"))


@dataclass(frozen=True)
class BrokenReward(Reward):
    """Lengths; at the third step the last rank's last completion has none."""

    def __call__(self, rollouts: Batch) -> RewardOutput:
        rewards_N = rollouts.lengths_N.float()
        if rollouts.step.number == 3 and last_rank():
            rewards_N[-1] = math.nan
        return RewardOutput(rewards_N)


def curve(output: Path) -> list[dict[str, float]]:
    """The metrics of a run, a row a step."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def run(ranks: int, output: Path, *flags: str) -> list[RankResult]:
    """The command on one process or several."""
    return run_ranks(ranks, main, [*WORDS, "--output", str(output), *flags])


def test_two_ranks_skip_the_steps_that_one_cannot_do(tmp_path: Path) -> None:
    """They go on as one process does that skipped them."""
    here = Path(__file__).stem
    for ranks in (1, 2):
        flags = ["--loss", f"{here}:BrokenLoss", "--reward", f"{here}:BrokenReward", "--on-nonfinite", "skip"]
        done = run(ranks, tmp_path / str(ranks), *flags)
        assert not any(rank.code for rank in done), done[-1].stderr[-3000:]
    alone, together = (curve(tmp_path / ranks) for ranks in ("1", "2"))
    assert [row["skipped/actor"] for row in alone] == [0, 1, 1, 0] == [row["skipped/actor"] for row in together]
    for step in (0, 3):
        for name in ("loss/actor", "reward/mean"):  # float32 summed in another order
            assert together[step][name] == pytest.approx(alone[step][name], rel=1e-3, abs=1e-4)
    assert alone[0]["loss/actor"] != pytest.approx(alone[3]["loss/actor"], rel=5e-3), "and something was learnt"


def test_two_ranks_stop_where_one_cannot_go_on(tmp_path: Path) -> None:
    done = run(2, tmp_path / "run", "--loss", f"{Path(__file__).stem}:BrokenLoss")
    assert all(rank.code > 0 for rank in done), "no rank waits for the other"
    told = [[line for line in rank.stderr.splitlines() if line.startswith("rlhf-run: ")] for rank in done]
    assert [len(lines) for lines in told] == [1, 1] and all(line.startswith("rlhf-run: step 2: ") for (line,) in told)
    assert sorted("another rank saved the samples" in line for (line,) in told) == [False, True]
