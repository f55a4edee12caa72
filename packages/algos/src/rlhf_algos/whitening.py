"""Whitening over every sampled token of the batch, on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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

    A deviation of at most `precision * max(1, |mean|)` is rounding, and all values are 0 then. Collective over `world`. The
    sums are float64 and the variance is taken about the mean in a second pass.
    """
    if how == "none":
        return values_NT
    total = world.sum if world is not None else lambda tensor: tensor
    count = total(mask_NT.sum().double()).clamp(min=1)
    mean = total(values_NT.double().masked_fill(~mask_NT, 0.0).sum()) / count
    centred_NT = (values_NT - mean.to(values_NT.dtype)).masked_fill(~mask_NT, 0.0)
    if how == "mean":
        return centred_NT
    variance = total(centred_NT.double().square().sum()) / count
    if float(variance.sqrt()) <= precision * max(1.0, abs(float(mean))):
        return torch.zeros_like(centred_NT)
    return centred_NT * variance.clamp(min=MIN_VARIANCE).rsqrt().to(values_NT.dtype)
