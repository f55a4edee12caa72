"""Whitening over every sampled token of the batch, on all ranks."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlhf_core.contract.results import PRECISION
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World

__all__ = ["Whiten", "whiten"]

Whiten = Literal["std", "mean", "none"]

MIN_VARIANCE = 1e-8  # small advantages are not blown up beyond 10,000 times; OpenRLHF's floor


def whiten(
    values_NT: Tensor, mask_NT: Tensor, how: Whiten, world: World | None, precision: float = PRECISION
) -> Tensor:
    """Subtract the mean over the mask and, for `std`, divide by the population standard deviation; zero outside it.

    A deviation of at most `precision * max(1, |mean|)` is rounding, and all values are 0 then. Collective over `world`: one
    call. The sums are float64. Each rank's squares are about its own mean and merge without cancellation (Chan, Golub and
    LeVeque 1979).
    """
    if how == "none":
        return values_NT
    own = _Moments.measure(values_NT, mask_NT)
    ranks = [own] if world is None else world.gather(own)
    count = max(1.0, sum(rank.tokens for rank in ranks))
    mean = sum(rank.total for rank in ranks) / count
    centered_NT = _center(values_NT, mask_NT, mean)
    if how == "mean":
        return centered_NT
    variance = sum(rank.squares + rank.tokens * (rank.mean - mean) ** 2 for rank in ranks) / count
    if sqrt(variance) <= precision * max(1.0, abs(mean)):
        return torch.zeros_like(centered_NT)
    return centered_NT * torch.tensor(variance, dtype=torch.float64).clamp(min=MIN_VARIANCE).rsqrt().to(values_NT.dtype)


class _Moments(NamedTuple):
    """Sums over a rank's sampled tokens."""

    tokens: float
    total: float
    squares: float
    """squared differences from `mean`"""

    @staticmethod
    def measure(values_NT: Tensor, mask_NT: Tensor) -> _Moments:
        """Return those of the values inside the mask."""
        sums = _Moments(float(mask_NT.sum()), float(values_NT.double().masked_fill(~mask_NT, 0.0).sum()), 0.0)
        return sums._replace(squares=float(_center(values_NT, mask_NT, sums.mean).double().square().sum()))

    @property
    def mean(self) -> float:
        """The mean of the rank; 0 without a token."""
        return self.total / max(1.0, self.tokens)


def _center(values_NT: Tensor, mask_NT: Tensor, mean: float) -> Tensor:
    """Return values minus their mean, rounded to their precision; zero outside the mask."""
    return (values_NT - torch.tensor(mean, dtype=torch.float64).to(values_NT.dtype)).masked_fill(~mask_NT, 0.0)
