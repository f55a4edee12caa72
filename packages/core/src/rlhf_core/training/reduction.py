"""From a loss's values to one number: the only place that divides.

A loss states how to average its values; core knows the counts of the whole optimizer step, over every micro-batch
and every rank. So each micro-batch contributes `weighted_sum(...) / count`, with `count` the same for all of them, and
accumulation, packing, padding, order and world size cannot change a loss or its gradient beyond rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.distributed import World
from rlhf_core.contract.results import Metric, Reduction
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LARGEST", "REDUCTIONS", "Counts", "Means", "SharedNames", "count", "token_count", "weighted_sum"]

REDUCTIONS = get_args(get_type_hints(Reduction)["per"])
"""Units that a loss may be averaged over."""
LARGEST = "largest of rank "
"""Start of what a rank calls its largest value of a name, followed by its number: a sum over ranks then keeps each."""


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
    """Return the denominator that a rank's whole optimizer step contributes."""
    return _count_per(reduction.per, batch, rows_per_unit)


def token_count(batch: Batch) -> float:
    """Return the number of tokens that a forward pass reads, padding left out."""
    return float((batch.prompt_lengths_N + batch.lengths_N).sum())


@dataclass(frozen=True)
class Counts:
    """Counts of the rows of an optimizer step that pass forward together: those of a rank, or of all ranks."""

    rounds: int
    """micro-batches; those of the rank that has most"""
    tokens: float
    """tokens that forward passes read"""
    units: Mapping[str, float]
    """denominators of losses, by the unit of a reduction"""
    kept: bool
    """True if a rank has kept sets"""

    @staticmethod
    def measure(batch: Batch, rounds: int) -> Counts:
        """Return the counts of a rank's rows, which are cut into so many micro-batches."""
        units = {per: _count_per(per, batch) for per in REDUCTIONS}
        return Counts(rounds, token_count(batch), units, bool(batch.kept_sets))

    @staticmethod
    def add_up(ranks: Sequence[Counts]) -> Counts:
        """Return the counts of all ranks together."""
        units = {per: sum(rank.units[per] for rank in ranks) for per in REDUCTIONS}
        rounds, tokens = max(rank.rounds for rank in ranks), sum(rank.tokens for rank in ranks)
        return Counts(rounds, tokens, units, any(rank.kept for rank in ranks))

    def denominator(self, reduction: Reduction, rows_per_unit: int = 1) -> float:
        """Return the denominator of a reduction; `rows_per_unit` rows are one sample."""
        total = self.units[reduction.per]
        return total / rows_per_unit if reduction.per == "sample" else total


def _count_per(per: str, batch: Batch, rows_per_unit: int = 1) -> float:
    match per:
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
    raise AssertionError(per)


class SharedNames:
    """The names that the ranks of a world have agreed on, so that numbers by name are added up in one reduction.

    A rank with a new name marks it in the reduction itself. Then the ranks exchange their names, and add up again:
    once for each new name of a run.
    """

    def __init__(self) -> None:
        self._names: list[Any] = []

    def sum(self, numbers: Mapping[Any, tuple[float, float]], world: World) -> dict[Any, tuple[float, float]]:
        """Return the sums of the pairs of each name over ranks, in float64. Collective."""
        if world.size == 1:
            return dict(numbers)
        new, sums = self._add_up(numbers, world)
        if new:
            self._names = sorted(set(self._names).union(*world.gather(set(numbers))))
            _, sums = self._add_up(numbers, world)
        return sums

    def _add_up(
        self, numbers: Mapping[Any, tuple[float, float]], world: World
    ) -> tuple[bool, dict[Any, tuple[float, float]]]:
        """Return True if a rank has further names, and the sums of those that are known."""
        new = float(not numbers.keys() <= set(self._names))
        pairs = [(new, 0.0), *(numbers.get(name, (0.0, 0.0)) for name in self._names)]
        (lacking, _), *sums = world.sum(torch.tensor(pairs, dtype=torch.float64)).tolist()
        return lacking > 0, {name: (first, second) for name, (first, second) in zip(self._names, sums, strict=True)}


class Means:
    """Metrics with their own denominators, and largest values, over micro-batches, optimizer steps and ranks."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], tuple[float, float]] = {}
        self._plain: dict[str, float] = {}
        self._largest: dict[str, float] = {}

    def add(self, name: str, total: float, count: float = 1.0, part: str = "") -> None:
        """Add `count` values whose sum is `total`. Parts of a name are separate means, which are added at the end."""
        old_total, old_count = self._sums.get((name, part), (0.0, 0.0))
        self._sums[name, part] = (old_total + total, old_count + count)

    def add_sum(self, name: str, value: float) -> None:
        """Add to a number that is a sum, not a mean (seconds); it stays this rank's own."""
        self._plain[name] = self._plain.get(name, 0.0) + value

    def add_largest(self, name: str, value: float) -> None:
        """Keep the largest of the values of a name, each at least 0 or nan, which counts as larger than all."""
        old = self._largest.get(name, 0.0)
        self._largest[name] = old if value <= old or isnan(old) else value

    def add_metric(self, name: str, metric: Metric) -> None:
        """Add what a loss measured on one micro-batch."""
        self.add(name, float(metric.total), float(metric.count))

    def merge(self, other: Means) -> None:
        """Add all that `other` holds."""
        for (name, part), (total, count) in other._sums.items():
            self.add(name, total, count, part)
        for name, value in other._plain.items():
            self.add_sum(name, value)
        for name, value in other._largest.items():
            self.add_largest(name, value)

    def reduce(self, world: World | None = None, names: SharedNames | None = None) -> dict[str, float]:
        """Return the mean of each name, over the ranks of `world` if given, the largest values and the sums.

        Names never counted are left out.

        Args:
            world: the ranks.
            names: those that they have agreed on, kept from step to step.
        """
        world = world or World()
        own = {(name, f"{LARGEST}{world.rank}"): (value, 0.0) for name, value in self._largest.items()}
        sums = (names or SharedNames()).sum(self._sums | own, world)
        means, all_ranks = dict[str, float](), Means()
        for name, part in sorted(sums):
            total, n = sums[name, part]
            if part.startswith(LARGEST):
                all_ranks.add_largest(name, total)
            elif n > 0:
                means[name] = means.get(name, 0.0) + total / n
        return means | all_ranks._largest | self._plain
