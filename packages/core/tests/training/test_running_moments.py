"""Running moments: merged batches have the count, mean and deviation of all values together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from thread_ranks import together

from rlhf_core.contract.distributed import World
from rlhf_core.training.running_moments import Moments

BATCHES = [[1.0, 2.0, 4.0], [10.0], [], [-3.0, 7.5, 0.25, 1e4]]


def test_batches_one_after_the_other_are_one_batch_of_all() -> None:
    seen = Moments()
    every: list[float] = []
    for values in BATCHES:
        seen.update(torch.tensor(values))
        every += values
        assert (seen.count, seen.mean, seen.std) == pytest.approx(
            (len(every), np.mean(every), np.std(every)), rel=1e-12
        )
    assert Moments(*seen.state()).state() == seen.state()
    assert Moments().std == 0


def test_ranks_have_the_moments_of_all_ranks() -> None:
    def rank(world: World) -> tuple[float, float, float]:
        seen = Moments()
        for first, second in (([5.0, 1.0], [9.0]), ([], [2.0, 2.5]), ([-1.0], [])):
            seen.update(torch.tensor(second if world.rank else first), world)
        return seen.count, seen.mean, seen.std

    every = [5.0, 1.0, 9.0, 2.0, 2.5, -1.0]
    for found in together(rank, 2):
        assert found == pytest.approx((6, np.mean(every), np.std(every)), rel=1e-12)
