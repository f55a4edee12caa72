"""Running mean and deviation of everything seen so far, over all ranks: what normalizes rewards from step to step.

Batches are merged by Chan, Golub and LeVeque's rule (1979), which generalizes Welford's (1962) and does not cancel.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from rlhf_core.contract.distributed import World
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Moments"]


class Moments:
    """Count, mean and sum of squared deviations; three floats, which checkpoints keep."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, squares: float = 0.0) -> None:
        self.count, self.mean, self.squares = count, mean, squares

    def update(self, values_N: Tensor, world: World | None = None) -> None:
        """Take in the values of all ranks of `world`. Collective; float64, so that how they are dealt out hardly matters."""
        world = world or World()
        values_N = values_N.double()
        count, total = world.sum(torch.stack([torch.tensor(float(len(values_N))).double(), values_N.sum()])).tolist()
        if not count:
            return
        mean = total / count
        squares = float(world.sum((values_N - mean).square().sum()))
        both, apart = self.count + count, mean - self.mean
        self.squares += squares + apart * apart * self.count * count / both
        self.mean += apart * count / both
        self.count = both

    @property
    def std(self) -> float:
        """The population's standard deviation; 0 before there are two values."""
        return sqrt(self.squares / self.count) if self.count else 0.0

    def state(self) -> tuple[float, float, float]:
        """Return the arguments of the constructor."""
        return self.count, self.mean, self.squares
