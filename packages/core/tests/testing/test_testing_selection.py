"""The kit's checks of filters and samplers pass core's own and name what a broken one does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import pytest
import torch

from rlhf_core import ContractError, Filter, RewardOutput, Rollouts, Sampler
from rlhf_core.data.shuffling import ShuffledSampler
from rlhf_core.testing import check_filter, check_sampler
from rlhf_core.training.filters import InsideFilter, VariedFilter

SEEN: list[int] = []
"""What must not be: something that providers remember outside of their engines."""


def test_core_keeps_its_own_contract() -> None:
    assert check_filter(VariedFilter()).tolist() == [True, True, True]
    assert not check_filter(InsideFilter(low=2.0, high=3.0)).any()
    assert sorted(check_sampler(ShuffledSampler(), rows=40)) == list(range(40))


@dataclass(frozen=True)
class BrokenFilter(Filter):
    """Breaks one rule."""

    rule: str = ""
    """the rule"""

    def __call__(self, rollouts: Rollouts, rewards: RewardOutput) -> torch.Tensor:
        SEEN.append(0)
        accepted_P = torch.ones(len(rollouts.group_N.unique()), dtype=torch.bool)
        if self.rule == "rows":
            return torch.ones(len(rollouts), dtype=torch.bool)
        if self.rule == "three":
            return torch.ones(3, dtype=torch.bool)
        if self.rule == "inputs":
            rewards.rewards_N.zero_()
        return accepted_P & (len(SEEN) % 2 == 0) if self.rule == "again" else accepted_P


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("rows", r"returned torch.bool of shape \(12,\); return torch.bool of shape \(3,\)"),
        ("three", r"returned torch.bool of shape \(3,\); return torch.bool of shape \(1,\)"),
        ("inputs", "must leave rollouts and rewards as they are"),
        ("again", "must accept the same groups each time"),
    ],
)
def test_a_broken_filter_is_named(rule: str, message: str) -> None:
    with pytest.raises((AssertionError, ContractError), match=f"BrokenFilter .*{message}"):
        check_filter(BrokenFilter(rule))


@dataclass(frozen=True)
class BrokenSampler(Sampler):
    """Breaks one rule."""

    rule: str = ""
    """the rule"""

    def open(self, context: object) -> BrokenEngine:
        return BrokenEngine(self.rule)


class BrokenEngine:
    """Counts up, skipping a row for each update."""

    def __init__(self, rule: str) -> None:
        self.rule, self.place = rule, 0

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        if self.rule == "range":
            yield rows
        for _ in range(6) if self.rule == "end" else count():
            SEEN.append(0)
            self.place += 1
            yield (len(SEEN) if self.rule == "again" else self.place) % rows

    def update(self, row_N: torch.Tensor, scores_N: torch.Tensor) -> None:
        self.place += 1

    def state_dict(self) -> Mapping[str, Any]:
        return {} if self.rule == "state" else {"place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.place = state.get("place", 0)

    def close(self) -> None: ...


@dataclass(frozen=True)
class Stateless(Sampler):
    """Reacts, and remembers nothing."""

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        return (number % rows for number in count())


@dataclass(frozen=True)
class NoEpochs(Stateless):
    """Declares epochs, and gives row 0 alone."""

    reacts: ClassVar[bool] = False
    epochs: ClassVar[bool] = True

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        return (0 for _ in count())


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (BrokenSampler("range"), "gave 11, which is not a row from 0 to 10"),
        (BrokenSampler("end"), "must give rows without end; it gave 6"),
        (BrokenSampler("again"), "must give the same rows after the same scores"),
        (BrokenSampler("state"), "must continue from its state as if it had never stopped"),
        (Stateless(), "the engine of Stateless needs state_dict and load_state_dict exactly if it reacts"),
        (NoEpochs(), "11 draws are not every row once"),
    ],
    ids=str,
)
def test_a_broken_sampler_is_named(sampler: Sampler, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_sampler(sampler)


def test_a_sampler_that_keeps_the_rules_passes() -> None:
    """Four rows a step, and one left out after each: by hand."""
    assert check_sampler(BrokenSampler())[:9] == [1, 2, 3, 4, 6, 7, 8, 9, 0]
