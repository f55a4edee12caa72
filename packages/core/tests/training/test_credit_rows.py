"""Credit may select rows, of some ranks or steps none: the others go on, and a step without any leaves the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_nonfinite import Watching, lines
from test_nonfinite_ranks import curve, run

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit, RewardOutput
from rlhf_core.testing import tiny_rollouts, tiny_run
from rlhf_core.training.microbatch import micro_batch


@dataclass(frozen=True)
class FirstPrompt(Advantage):
    """Only the completions of the prompt with the least number are trained on, which are on one rank."""

    never_at: int = 0
    """the step in which nothing is"""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, torch.Tensor]) -> Credit:
        ids_N = rollouts.extras["uids_N"]
        parts = rollouts.world.gather(ids_N.tolist()) if rollouts.world is not None else [ids_N.tolist()]
        none = rollouts.step.number == self.never_at
        chosen_N = (ids_N == min(min(part) for part in parts)) & (not none)
        advantages_NT = torch.where(rollouts.mask_NT, 0.5 + rewards.rewards_N[:, None], 0.0)
        return Credit(advantages_NT, rows=chosen_N.nonzero().flatten())


def test_a_rank_without_rows_goes_along_with_one_that_has_some(tmp_path: Path) -> None:
    for ranks in (1, 2):
        done = run(ranks, tmp_path / str(ranks), "--advantage", f"{Path(__file__).stem}:FirstPrompt")
        assert not any(rank.code for rank in done), done[-1].stderr[-3000:]
    for alone, together in zip(curve(tmp_path / "1"), curve(tmp_path / "2"), strict=True):
        for name in ("loss/actor", "reward/mean", "grad_norm/actor"):  # float32 summed in another order
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-4)


def test_a_step_that_trains_on_nothing_moves_no_weight_and_no_moment(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": "tiny:hidden=16,layers=1", "steps": 3, "actor": {"optim": {"lr": 1e-2}}}
    watched = Watching(tiny_run(tmp_path, advantage=FirstPrompt(never_at=2), **options).config)
    watched.train()
    assert watched.states[1] == watched.states[0]
    assert watched.states[2] != watched.states[1]
    first, second, third = lines(tmp_path / "metrics.jsonl")
    assert second["skipped/actor"] == 1 and not {"skipped/actor"} & {*first, *third}
    assert "loss/actor" not in second and "grad_norm/actor" not in second


def test_what_stands_in_for_no_rows_has_everything_that_a_row_has() -> None:
    batch = tiny_rollouts().with_extras(advantages_NT=torch.ones(8, 6), labels_N=torch.ones(8, dtype=torch.bool))
    nothing = batch.rows([])
    unit = micro_batch(nothing, [], 0, unit=2)
    assert len(unit) == 2 and set(unit.extras) == set(batch.extras)
    for name in ("advantages_NT", "labels_N"):
        assert unit[name].dtype == batch[name].dtype and not unit[name].any()
    assert not unit.kept_sets
    assert [len(each) for each in micro_batch(nothing, [], 0, unit=2, kept=True).kept_sets] == [1, 1]  # type: ignore[arg-type]
    again = micro_batch(batch, [torch.tensor([3]), torch.tensor([5])], 7)
    assert torch.equal(again.tokens_NT, batch.rows([5]).tokens_NT), "past the last, the last again"
