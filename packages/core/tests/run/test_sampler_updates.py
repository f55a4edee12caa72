"""In a run, a sampler that reacts gets the scores of every scoring, and none of a step that is skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rlhf_core import ContractError, Reward, RewardOutput, Rollouts, Sampler
from rlhf_core.testing.tiny import tiny_run

UPDATES: list[tuple[list[int], list[float]]] = []
"""Rows and scores of each update."""


@dataclass(frozen=True)
class InTurn(Sampler):
    """The rows in turn; updates are noted."""

    def open(self, context: object) -> InTurnEngine:
        return InTurnEngine()


class InTurnEngine:
    def __init__(self) -> None:
        self.place = 0

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        while True:
            self.place += 1
            yield (self.place - 1) % rows

    def update(self, row_N: torch.Tensor, scores_N: torch.Tensor) -> None:
        assert (row_N.dtype, scores_N.dtype) == (torch.int64, torch.float64)
        UPDATES.append((row_N.tolist(), scores_N.tolist()))

    def state_dict(self) -> Mapping[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.place = state["place"]

    def close(self) -> None: ...


@dataclass(frozen=True)
class OfRow(Reward):
    """The row's number, of the first completion one less: rows differ, and so do completions."""

    broken: int = -1
    """row whose reward is not a number"""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        row_N = rollouts["row_N"].float()
        rewards_N = row_N - (torch.arange(len(rollouts)) % 2 == 0).float() * (row_N != 1)  # row 1 always earns 1
        rewards_N[rollouts["row_N"] == self.broken] = float("nan")
        return RewardOutput(rewards_N)


@pytest.fixture(autouse=True)
def _no_updates_yet() -> None:
    UPDATES.clear()


def test_each_scoring_updates_the_sampler_with_rows_and_scores(tmp_path: Path) -> None:
    tiny_run(tmp_path, sampler=InTurn(), reward=OfRow()).train()
    assert UPDATES == [([0, 0, 1, 1], [-1.0, 0.0, 1.0, 1.0]), ([2, 2, 3, 3], [1.0, 2.0, 2.0, 3.0])]


def test_prompts_that_a_filter_rejects_count_and_are_replaced_through_the_sampler(tmp_path: Path) -> None:
    """Row 1 has one score only, so that a second round draws rows 2 and 3."""
    tiny_run(tmp_path, sampler=InTurn(), reward=OfRow(), filter="varied", steps=1).train()
    assert [rows for rows, _ in UPDATES] == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_a_scoring_with_a_reward_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    tiny_run(tmp_path, sampler=InTurn(), reward=OfRow(broken=1), on_nonfinite="skip").train()
    assert [rows for rows, _ in UPDATES] == [[2, 2, 3, 3]]


@dataclass(frozen=True)
class Forgetful(Sampler):
    """Reacts without a state, or the other way round."""

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        return (number % rows for number in count())


@dataclass(frozen=True)
class Indifferent(InTurn):
    """Has a state, and declares that it does not react."""

    reacts: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Forgetful(), r"Forgetful of .* reacts to scores, so open\(\) must return an object with state_dict"),
        (Indifferent(), "Indifferent of .* has a state, but declares that it does not react"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_sampler_has_a_state_exactly_if_it_reacts(tmp_path: Path, sampler: Sampler, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        tiny_run(tmp_path, sampler=sampler).train()
