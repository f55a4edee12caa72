"""Reward shaping against numbers worked by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import UsageError
from rlhf_core.testing.tiny import tiny_rollouts, tiny_run
from rlhf_core.testing.tiny_algorithm import TinyAlgorithm
from rlhf_core.training.reward_shaping import RewardShaping


def rollouts_of(*lengths: int) -> Rollouts:
    """Completions of these lengths; the last was cut."""
    rollouts = tiny_rollouts(1, len(lengths))
    rollouts.mask_NT = torch.arange(10)[None] < torch.tensor(lengths)[:, None]
    return rollouts


def test_overlong_completions_lose_in_proportion_within_the_buffer() -> None:
    """10 tokens at most, a buffer of 4: lengths 6, 7, 8, 10 lose 0, 1/4, 2/4, 4/4 of the factor 2."""
    rewards = RewardOutput(torch.ones(4))
    shaped = RewardShaping(overlong_buffer=4, overlong_factor=2.0)(rewards, rollouts_of(6, 7, 8, 10), 10)
    assert shaped.rewards_N.tolist() == [1.0, 0.5, 0.0, -1.0]
    assert shaped.scores_N is not None and shaped.scores_N.tolist() == [1.0] * 4


def test_scores_stay_those_of_whole_completions_and_what_cannot_scale_tokens_is_refused() -> None:
    """A turn's reward of 2 at the second token counts in the score, as filters and samplers read it."""
    tokens_NT = torch.zeros(2, 10)
    tokens_NT[0, 1] = 2.0
    rewards = RewardOutput(torch.tensor([1.0, 4.0]), tokens_NT)
    shaped = RewardShaping(stop_properly=0.5)(rewards, rollouts_of(5, 10), 10)
    assert shaped.outcome_N.tolist() == rewards.outcome_N.tolist() == [3.0, 4.0]
    assert shaped.rewards_N.tolist() == [1.0, 2.0]
    for options, name in (({"normalize": "running"}, "normalize"), ({"clip": 1.0}, "clip")):
        with pytest.raises(UsageError, match=f"algorithm.shaping.{name} works only with one reward per completion"):
            RewardShaping(**options)(rewards, rollouts_of(5, 10), 10)  # type: ignore[arg-type]


def test_what_others_said_between_two_turns_counts_as_length() -> None:
    rollouts = rollouts_of(8, 0)
    rollouts.mask_NT[0, 2:5] = False
    shaped = RewardShaping(overlong_buffer=4)(RewardOutput(torch.zeros(2)), rollouts, 10)
    assert shaped.rewards_N.tolist() == [-0.5, 0.0]


@pytest.mark.parametrize(("coefficient", "cut"), [(0.5, 1.5), (0.0, 0.0), (-2.0, -2.0)])
def test_a_cut_completion_is_scaled_or_set(coefficient: float, cut: float) -> None:
    shaped = RewardShaping(stop_properly=coefficient)(RewardOutput(torch.full((2,), 3.0)), rollouts_of(5, 10), 10)
    assert shaped.rewards_N.tolist() == [3.0, cut]


@pytest.mark.parametrize("reason", ["length", "turns", "seconds", "error"])
def test_whatever_cut_an_episode_counts_as_cut(reason: Any) -> None:
    rollouts = rollouts_of(5, 5)
    rollouts.finish = ["stop", reason]
    shaped = RewardShaping(stop_properly=0.25)(RewardOutput(torch.full((2,), 4.0)), rollouts, 10)
    assert shaped.rewards_N.tolist() == [4.0, 1.0]


def test_clipping_comes_last_and_nonsense_is_refused() -> None:
    shaped = RewardShaping(stop_properly=-9.0, clip=2.0)(RewardOutput(torch.tensor([5.0, 1.0])), rollouts_of(5, 9), 10)
    assert shaped.rewards_N.tolist() == [2.0, -2.0]
    with pytest.raises(UsageError, match="more than the 10"):
        RewardShaping(overlong_buffer=11)(RewardOutput(torch.zeros(1)), rollouts_of(1), 10)
    with pytest.raises(UsageError, match="clip must be above 0"):
        RewardShaping(clip=0.0)


@dataclass(frozen=True)
class Shaped(TinyAlgorithm):
    """The tiny algorithm with a constant for completions that are cut."""

    shaping: RewardShaping = RewardShaping(stop_properly=-7.0)


def test_a_run_shapes_the_rewards_that_it_trains_on(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, Shaped(), steps=1, sampling={"max_new_tokens": 1, "n": 2})
    metrics = run.train().metrics
    assert metrics["completion/truncated"] == 1 and metrics["reward/mean"] == -7.0
