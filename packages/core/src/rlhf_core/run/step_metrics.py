"""What a run measures of itself in a step: times of its phases, and numbers over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_core.training.reduction import Means

if TYPE_CHECKING:
    from rlhf_core.contract.distributed import World

__all__ = ["Meter"]


class Meter:
    """The metrics of the present step, as they come in."""

    @property
    def world(self) -> World:
        """The ranks that measure together."""
        raise NotImplementedError

    def __init__(self) -> None:
        self.doing = "start"
        """the phase the run is in; after an error, the one it failed in"""
        self._metrics = Means()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to `time/<name>`."""
        before, self.doing = self.doing, name
        started = time.perf_counter()
        yield
        self.add_seconds(name, time.perf_counter() - started)
        self.doing = before

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add to `time/<name>` of this step."""
        self._metrics.add_sum(f"time/{name}", seconds)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Metrics of this step that need no averaging."""
        for name, value in metrics.items():
            self._metrics.add(name, value)

    def log_batch(self, name: str, values_N: Any) -> float:
        """The mean of a per-completion number over all ranks; logged and returned."""
        mean = self.world_sum(float(values_N.sum())) / self.world_sum(float(len(values_N)))
        self.log({name: mean})
        return mean

    def world_sum(self, value: float) -> float:
        """A number summed over ranks."""
        if self.world.size == 1:
            return value
        return float(self.world.sum(torch.tensor(value, dtype=torch.float64)))
