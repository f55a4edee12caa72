"""Differences that are rounding: of rewards within a prompt, and of margins of pairs."""

from __future__ import annotations

import pytest
import torch

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.engines import open_provider
from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.reward.output import to_reward_output
from rlhf_core.reward.sum import Sum
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.filters import VariedFilter
from rlhf_core.training.rounding import equal_groups, level_groups, prefer_chosen

GROUPS = torch.tensor([0, 0, 1, 1, 2, 3, 3])
VALUES = torch.tensor([0.5, 0.5 + 6e-8, 0.5, 0.50001, 9.0, 2e6, 2e6 + 1])


def test_values_are_equal_within_their_precision_relative_to_the_larger_of_one_and_themselves() -> None:
    assert equal_groups(VALUES, GROUPS).tolist() == [True, True, False, False, True, True, True]
    assert equal_groups(VALUES, GROUPS, 1e-4).all()
    assert equal_groups(-VALUES, GROUPS).tolist() == equal_groups(VALUES, GROUPS).tolist()


def test_equal_values_become_one_and_others_stay_bit_for_bit() -> None:
    level_N = level_groups(VALUES, GROUPS)
    assert level_N[0] == level_N[1] == pytest.approx(0.5) and level_N[5] == level_N[6]
    assert level_N[2:5].tolist() == VALUES[2:5].tolist()
    exact = torch.tensor([0.1, 0.1, 0.7])
    assert level_groups(exact, torch.tensor([0, 0, 0])).tolist() == exact.tolist()
    same = torch.full((7,), 0.1)
    assert level_groups(same, torch.zeros(7, dtype=torch.long)).tolist() == same.tolist()


@pytest.mark.parametrize(
    ("rewards", "varied"),
    [
        (torch.tensor([0.5, 0.5 + 6e-8, 0.5, 0.6]), [False, True]),
        (torch.tensor([0.5, 0.502, 0.5, 0.6]).bfloat16(), [False, True]),
        (RewardOutput(torch.tensor([0.5, 0.502, 0.5, 0.6]), precision=8e-3), [False, True]),
        (torch.tensor([0.5, 0.502, 0.5, 0.6]), [True, True]),
    ],
)
def test_every_reward_is_made_level_where_it_is_read_and_filters_compare_in_its_precision(
    rewards: RewardOutput | torch.Tensor, varied: list[bool]
) -> None:
    batch = make_batch([1] * 4, groups=[0, 0, 1, 1])
    output = to_reward_output(rewards, batch, object())
    assert [bool(output.rewards_N[i] != output.rewards_N[i + 1]) for i in (0, 2)] == varied
    assert VariedFilter()(batch, output).tolist() == varied
    raw = rewards if isinstance(rewards, RewardOutput) else RewardOutput(rewards.float(), precision=output.precision)
    assert VariedFilter()(batch, raw).tolist() == varied, "a filter compares in the precision that rewards have"


def test_a_reward_read_from_a_narrow_role_is_as_precise_as_the_role() -> None:
    batch = make_batch([1] * 2, groups=[0, 0])
    output = to_reward_output(torch.tensor([0.5, 0.502]), batch, object(), precision=8e-3)
    assert output.rewards_N[0] == output.rewards_N[1] and output.precision == 8e-3


@pytest.mark.parametrize(("weight", "precision", "varied"), [(1.0, 8e-3, False), (0.1, 8e-4, True), (0.0, 1e-6, True)])
def test_a_part_of_a_sum_is_as_coarse_as_its_weight(weight: float, precision: float, varied: bool) -> None:
    """Differences of 0.005 of an exact part are noise beside a bfloat16 part, unless that counts little."""

    def exact(completions: list[str]) -> list[float]:
        return [0.5, 0.505]

    batch = make_batch([1] * 2, groups=[0, 0])
    with open_provider(Sum((exact, NarrowReward()), (1.0, weight))) as engine:
        output = to_reward_output(engine(batch), batch, engine)
    assert output.precision == pytest.approx(precision)
    assert VariedFilter()(batch, output).tolist() == [varied] == [bool(output.rewards_N[0] != output.rewards_N[1])]


class NarrowReward(Reward):
    """Reward that is equal for all completions, from a model in bfloat16."""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        return RewardOutput(torch.ones(len(rollouts)), precision=8e-3)


def test_margins_within_rounding_are_ties() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, 1e-7, 500.001]), torch.tensor([0.0, 1.0, 0.0, 500.0])
    assert prefer_chosen(chosen, rejected).tolist() == [1.0, 0.0, 0.5, 0.5]
    assert prefer_chosen(torch.tensor([1e-3]), torch.tensor([0.0])).tolist() == [1.0]
