"""From a loss's values to one number: the only place that divides.

A loss says how its values should be averaged; core knows the counts of the whole optimiser step, over every micro-batch
and every rank. So each micro-batch contributes `weighted_sum(...) / count`, with `count` the same for all of them, and
accumulation, packing, padding, order and world size cannot change a loss or its gradient beyond rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.results import Metric, Reduction
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World

__all__ = ["Means", "count", "weighted_sum"]


def weighted_sum(values: Tensor, reduction: Reduction, batch: Batch) -> Tensor:
    """The numerator of a micro-batch: `values` masked, weighted as `reduction` asks, and summed. Differentiable."""
    if reduction.per == "sample":
        return values.float().sum()
    mask_NT = batch.mask_NT.to(values.device)
    values_NT = torch.where(mask_NT, values.float(), 0.0)  # not a product: inf * 0 outside the mask would be nan
    if reduction.per == "sequence":
        return (values_NT.sum(1) / mask_NT.sum(1).clamp(min=1)).sum()
    if reduction.per == "constant":
        return values_NT.sum() / reduction.length
    return values_NT.sum()


def count(reduction: Reduction, batch: Batch, rows_per_unit: int = 1) -> float:
    """The denominator that a rank's whole optimiser step contributes."""
    match reduction.per:
        case "token":
            return float(batch.mask_NT.sum())
        case "sequence":
            return float(batch.mask_NT.any(1).sum())
        case "sample":
            return len(batch) / rows_per_unit
        case "prompt":
            return float(len(batch.group_N.unique()))
        case "constant":
            return float(len(batch))
        case "sum":
            return 1.0 / batch.world.size if batch.world is not None else 1.0


class Means:
    """Metrics with their own denominators, added up over micro-batches, optimiser steps and ranks."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], tuple[float, float]] = {}
        self._plain: dict[str, float] = {}

    def add(self, name: str, total: float, count: float = 1.0, part: str = "") -> None:
        """Add `count` values whose sum is `total`. Parts of a name are means of their own, which are added at the end."""
        old_total, old_count = self._sums.get((name, part), (0.0, 0.0))
        self._sums[name, part] = (old_total + total, old_count + count)

    def add_sum(self, name: str, value: float) -> None:
        """Add to a number that is a sum, not a mean (seconds); it stays this rank's own."""
        self._plain[name] = self._plain.get(name, 0.0) + value

    def add_metric(self, name: str, metric: Metric) -> None:
        """Add what a loss measured on one micro-batch."""
        self.add(name, float(metric.total), float(metric.count))

    def merge(self, other: Means) -> None:
        """Add all that `other` holds."""
        for (name, part), (total, count) in other._sums.items():
            self.add(name, total, count, part)
        for name, value in other._plain.items():
            self.add_sum(name, value)

    def reduce(self, world: World | None = None) -> dict[str, float]:
        """The mean of each name, over the ranks of `world` if given, and the sums. Names never counted are left out."""
        keys = sorted(set(self._sums).union(*world.gather(set(self._sums)) if world is not None else ()))
        sums = torch.tensor([self._sums.get(key, (0.0, 0.0)) for key in keys], dtype=torch.float64).reshape(-1, 2)
        if world is not None:
            sums = world.sum(sums)
        means: dict[str, float] = {}
        for (name, _), (total, n) in zip(keys, sums.tolist(), strict=True):
            if n > 0:
                means[name] = means.get(name, 0.0) + total / n
        return means | self._plain
