"""The metrics of a step as they come in: times of its phases, and numbers over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rlhf_core.contract.distributed import World
from rlhf_core.training.reduction import Means
from rlhf_core.util.activity import report

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
"""Words for the phases of a step, for a live display."""


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

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to `time/<name>`."""
        before, self.doing = self.doing, name
        report(PHASES.get(name, name))
        started = time.perf_counter()
        yield
        self.add_seconds(name, time.perf_counter() - started)
        self.doing = before

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add to `time/<name>`."""
        self.add_sum(f"time/{name}", seconds)

    def add_sum(self, name: str, value: float) -> None:
        """Add to a number that is a sum over the step."""
        self._means.add_sum(name, value)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add metrics that need no averaging over rows or ranks."""
        for name, value in metrics.items():
            self._means.add(name, value)

    def log_batch(self, name: str, values_N: Any) -> float:
        """Log and return the mean of a per-completion number over all ranks; without a completion 0, which is not logged."""
        total, count = self.world.total(float(values_N.sum())), self.world.total(float(len(values_N)))
        if not count:
            return 0.0
        self.log({name: total / count})
        return total / count

    def merge(self, other: Meter) -> None:
        """Add everything that `other` collected."""
        self._means.merge(other._means)

    def take(self) -> dict[str, float]:
        """Return what was collected, and begin again from nothing."""
        means, self._means = self._means, Means()
        return means.reduce(None)
