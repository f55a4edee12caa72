"""Results of providers: the numbers that core derives from them."""

from __future__ import annotations

from fractions import Fraction

import torch

from rlhf_core.contract.results import RewardOutput


def test_the_total_reward_adds_what_was_given_token_by_token_in_float64() -> None:
    """The expected sums are exact rational ones; float32 would lose the small addends."""
    rewards_N = torch.tensor([2.0**24, -1.5])
    rewards_NT = torch.tensor([[0.5, 0.25, 2.0**-20], [1.0, 0.0, -0.125]])
    expected = [
        Fraction(whole) + sum(Fraction(token) for token in tokens)
        for whole, tokens in zip(rewards_N.tolist(), rewards_NT.tolist(), strict=True)
    ]
    total_N = RewardOutput(rewards_N=rewards_N, rewards_NT=rewards_NT).total_N
    assert [Fraction(each) for each in total_N.tolist()] == expected
    assert RewardOutput(rewards_N=rewards_N).total_N.tolist() == rewards_N.tolist()
