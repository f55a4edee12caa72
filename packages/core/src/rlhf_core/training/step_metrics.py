"""The metrics of a step as they come in: times of its phases, and numbers over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.distributed import World
from rlhf_core.contract.results import Metric
from rlhf_core.lazy import torch
from rlhf_core.training.reduction import LARGEST, Means, SharedNames
from rlhf_core.util.activity import report
from rlhf_core.util.clock import current_time

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Meter"]

PHASES = {
    "data": "reading rows",
    "rollout": "sampling",
    "reward": "scoring",
    "needs": "comparing",
    "credit": "assigning credit",
    "train": "training",
    "sync": "handing weights over",
    "checkpoint": "saving",
}
"""Names of the phases of a step, for a live display."""


class Meter:
    """Collects metrics until they are taken. A run has one for the step at hand, and each iteration its own.

    Args:
        world: the ranks that measure together.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.doing = "start"
        """the phase at hand; after an error, the one that failed"""
        self._means = Means()
        self._shared: dict[tuple[str, str, int], tuple[float, float]] = {}
        """pairs of numbers that are added up over ranks when they are taken: by name, kind and number of the call"""
        self._calls: Counter[tuple[str, str]] = Counter()
        self._names = SharedNames()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to `time/<name>`."""
        before, self.doing = self.doing, name
        report(PHASES.get(name, name))
        started = current_time()
        yield
        self.add_seconds(name, current_time() - started)
        self.doing = before

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add to `time/<name>`."""
        self.add_sum(f"time/{name}", seconds)

    def add_sum(self, name: str, value: float) -> None:
        """Add to a number that is a sum over the step."""
        self._means.add_sum(name, value)

    def log(self, metrics: Mapping[str, float | Metric]) -> None:
        """Add metrics: numbers that are those of all ranks, and totals with their counts, which the ranks add up."""
        for name, value in metrics.items():
            if isinstance(value, Metric):
                self.log_mean(name, float(value.total), float(value.count))
            else:
                self._means.add(name, value)

    def log_batch(self, name: str, values_N: Tensor) -> None:
        """Log the mean of a per-completion number over all ranks; nothing if no rank has a completion."""
        self.log_mean(name, float(values_N.sum()), float(len(values_N)))

    def log_mean(self, name: str, total: float, count: float) -> None:
        """Log the mean of `count` values of each rank whose sum is `total`; nothing if no rank has one.

        Several calls under a name log separate means, and the metric is the mean of these.
        """
        self._share(name, "mean", (total, count))

    def log_token_mean(self, name: str, total: float, tokens: float) -> None:
        """Log the mean over tokens of all ranks whose sum is `total` on this one; 0 where no rank has a token."""
        self._share(name, "tokens", (total, tokens))

    def log_variance(self, name: str, values_N: Tensor) -> None:
        """Log the variance of a per-completion number around its mean over all ranks (Chan, Golub and LeVeque 1979)."""
        count, total = float(len(values_N)), float(values_N.sum())
        mean = total / max(count, 1.0)
        self._share(name, "within", (float((values_N - mean).square().sum()), count))
        self._share(name, "between", (count * mean * mean, total))

    def log_sources(self, name: str, values_N: Tensor, meta: Sequence[Mapping[str, Any]]) -> None:
        """Log the means over the rows of each `datasource` as `name/<datasource>`; rows that have none count nowhere."""
        own = [str(each["datasource"]) if "datasource" in each else None for each in meta]
        for source in sorted({each for each in own if each is not None}):
            mine_N = torch.tensor([each == source for each in own])
            self.log_mean(f"{name}/{source}", float(values_N[mine_N].double().sum()), float(mine_N.sum()))

    def log_total(self, name: str, value: float) -> None:
        """Add to a number that is a sum over the step and all ranks."""
        self._share(name, "total", (value, 0.0))

    def log_largest(self, name: str, value: float) -> None:
        """Log the largest of the numbers of all ranks, each at least 0."""
        self._share(name, f"{LARGEST}{self.world.rank}", (value, 0.0))

    def _share(self, name: str, kind: str, pair: tuple[float, float]) -> None:
        """Keep numbers until the ranks add them up: those of the k-th call here belong to the k-th call elsewhere."""
        self._calls[name, kind] += 1
        self._shared[name, kind, self._calls[name, kind]] = pair

    def merge(self, other: Meter) -> None:
        """Add everything that `other` collected."""
        self._means.merge(other._means)
        for (name, kind, _), pair in other._shared.items():
            self._share(name, kind, pair)

    def take(self) -> dict[str, float]:
        """Return what was collected over all ranks, and begin again from nothing. Collective: one reduction."""
        sums = self._names.sum(self._shared, self.world)
        means, self._means = self._means, Means()
        self._shared, self._calls = {}, Counter()
        for name, kind, call in sorted(sums):
            first, second = sums[name, kind, call]
            if kind == "total":
                means.add_sum(name, first)
            elif kind.startswith(LARGEST):
                means.add_largest(name, first)
            elif kind == "tokens":
                means.add(name, first / max(1.0, second))
            elif kind == "mean" and second:
                means.add(name, first / second)
            elif kind == "within" and second:
                squares, total = sums[name, "between", call]
                between = squares - second * (total / second) * (total / second)
                means.add(name, (first + max(between, 0.0)) / second)
        return means.reduce(None)
