"""GDPO against loops over lists, and what it refuses."""

from __future__ import annotations

import threading
from dataclasses import replace
from statistics import fmean, pstdev, stdev
from typing import Any

import pytest
import torch

from rlhf_algos.advantage.gdpo import GDPOAdvantage
from rlhf_algos.advantage.grpo import GRPOAdvantage
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.distributed import World
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import UsageError
from rlhf_core.testing.batches import make_batch

GROUPS = [7, 7, 7, 2, 2, 4, 4, 4]


def given(weights: tuple[float, ...], seed: int = 0) -> tuple[Rollouts, RewardOutput]:
    """Three parts of very different sizes; the second is equal in the first group."""
    noise = torch.Generator().manual_seed(seed)
    rollouts = make_batch([3, 1, 4, 2, 5, 1, 2, 3], groups=GROUPS)
    parts = {
        name: scale * torch.randn(8, generator=noise) for name, scale in (("math", 1), ("form", 0.1), ("length", 50))
    }
    parts["form"][:3] = 0.3
    total_N = sum(weight * part_N for weight, part_N in zip(weights, parts.values(), strict=True))
    assert isinstance(total_N, torch.Tensor)
    return rollouts, RewardOutput(total_N, metrics={**parts, "math/detail": torch.ones(8)})


def by_loops(parts: list[list[float]], weights: tuple[float, ...]) -> list[float]:
    """Each part standardized in its group, the weighted sum standardized over the batch."""
    summed = [0.0] * len(GROUPS)
    for part, weight in zip(parts, weights, strict=True):
        for i, group in enumerate(GROUPS):
            peers = [value for value, other in zip(part, GROUPS, strict=True) if other == group]
            summed[i] += weight * (part[i] - fmean(peers)) / stdev(peers) if stdev(peers) > 1e-6 else 0.0
    return [(value - fmean(summed)) / pstdev(summed) for value in summed]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, -0.02)])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_agrees_with_loops_over_its_definition(weights: tuple[float, ...], seed: int) -> None:
    rollouts, rewards = given(weights, seed)
    advantages_NT = GDPOAdvantage(weights=weights)(rewards, rollouts, {}).advantages_NT
    parts = [rewards.metrics[name].double().tolist() for name in ("math", "form", "length")]
    assert advantages_NT[:, 0].tolist() == pytest.approx(by_loops(parts, weights), abs=2e-6)
    assert torch.equal(advantages_NT, advantages_NT[:, :1] * rollouts.mask_NT), "every token of a completion has it"
    named = GDPOAdvantage(parts=("length", "math", "form"), weights=(weights[2], weights[0], weights[1]))
    torch.testing.assert_close(named(rewards, rollouts, {}).advantages_NT, advantages_NT)


class Ranks(World):
    """Threads that add up what they tell each other."""

    def __init__(self, rank: int, board: list[Any], meeting: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.meeting = rank, len(board), board, meeting

    def gather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.meeting.wait(120)
        found = list(self.board)
        self.meeting.wait(120)
        return found


def test_the_number_of_ranks_changes_no_advantage() -> None:
    rollouts, rewards = given((1.0, 1.0, 1.0))
    alone_N = GDPOAdvantage()(rewards, rollouts, {}).advantages_NT[:, 0]
    board, meeting, found = [None] * 2, threading.Barrier(2), {}

    def rank(number: int, share: list[int]) -> None:
        mine = replace(rollouts.rows(share), world=Ranks(number, board, meeting))
        found[number] = GDPOAdvantage()(rewards.rows(share), mine, {}).advantages_NT[:, 0]

    threads = [threading.Thread(target=rank, args=each) for each in enumerate(([*range(5)], [5, 6, 7]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([found[0], found[1]]), alone_N, rtol=1e-5, atol=1e-6)


def test_a_part_that_abstains_from_a_completion_is_normalized_over_the_others() -> None:
    rollouts = make_batch([2] * 6, groups=[0, 0, 0, 1, 1, 1])
    parts = {"a": torch.tensor([1.0, 2.0, 4.0, 3.0, 1.0, 1.0]), "b": torch.tensor([5.0, 7.0, 0.0, 1.0, 0.0, 2.0])}
    known = {"b": torch.tensor([True, True, False, True, True, True])}
    rewards = RewardOutput(parts["a"] + parts["b"], metrics=parts, known=known)
    score = lambda values: [(value - fmean(values)) / stdev(values) for value in values]
    a = score([1.0, 2.0, 4.0]) + score([3.0, 1.0, 1.0])
    b = [*score([5.0, 7.0]), 0.0, *score([1.0, 0.0, 2.0])]
    summed = [x + y for x, y in zip(a, b, strict=True)]
    expected = [(value - fmean(summed)) / pstdev(summed) for value in summed]
    assert GDPOAdvantage()(rewards, rollouts, {}).advantages_NT[:, 0].tolist() == pytest.approx(expected, abs=2e-6)


def test_combinations_that_grpo_takes_for_one_stay_apart() -> None:
    """Two prompts: one completion is right in one part of two, or in both. GRPO's credit is the same for both."""
    rollouts = make_batch([2, 2, 2, 2], groups=[0, 0, 1, 1])
    parts = {"a": torch.tensor([0.0, 1.0, 0.0, 1.0]), "b": torch.tensor([0.0, 0.0, 0.0, 1.0])}
    rewards = RewardOutput(parts["a"] + parts["b"], metrics=parts)
    grpo, gdpo = (
        advantage(rewards, rollouts, {}).advantages_NT[:, 0] for advantage in (GRPOAdvantage(), GDPOAdvantage())
    )
    assert grpo[1] == grpo[3]
    assert gdpo[3] == pytest.approx(2 * float(gdpo[1]))


def test_token_rewards_are_added_after_the_normalization() -> None:
    rollouts, rewards = given((1.0, 1.0, 1.0))
    plain_NT = GDPOAdvantage()(rewards, rollouts, {}).advantages_NT
    penalty_NT = -0.1 * rollouts.mask_NT
    penalized = RewardOutput(rewards.rewards_N, penalty_NT, metrics=rewards.metrics)
    to_go_NT = penalty_NT.flip(1).cumsum(1).flip(1) * rollouts.mask_NT
    torch.testing.assert_close(GDPOAdvantage()(penalized, rollouts, {}).advantages_NT, plain_NT + to_go_NT)


@pytest.mark.parametrize(
    ("advantage", "message"),
    [
        (GDPOAdvantage(weights=(1.0, 2.0, 1.0)), "the parts 1 math, 2 form, 1 length sum to"),
        (GDPOAdvantage(parts=("math", "form")), "sum to"),
        (GDPOAdvantage(weights=(1.0,)), "has 1 numbers, but there are 3 parts: math, form, length"),
        (GDPOAdvantage(parts=("maths",)), "advantage.parts names? maths, but the reward reports math, form, length"),
    ],
)
def test_parts_that_are_not_those_of_the_reward_are_refused(advantage: GDPOAdvantage, message: str) -> None:
    rollouts, rewards = given((1.0, 1.0, 1.0))
    with pytest.raises(UsageError, match=message):
        advantage(rewards, rollouts, {})


def test_a_reward_without_parts_is_the_only_part() -> None:
    rollouts, rewards = given((1.0, 1.0, 1.0))
    advantages_NT = GDPOAdvantage()(RewardOutput(rewards.rewards_N), rollouts, {}).advantages_NT
    expected = by_loops([rewards.rewards_N.double().tolist()], (1.0,))
    assert advantages_NT[:, 0].tolist() == pytest.approx(expected, abs=2e-6)
