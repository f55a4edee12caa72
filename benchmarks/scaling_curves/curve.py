"""Curves and the measurement of their costs.

@curve("ranks", "tokenizing a rank's share of a batch")
def ranks(quick: bool) -> Measured:
    points = [(n, cpu_seconds(lambda: share_of(n))) for n in ((1, 2) if quick else (1, 4, 16, 64))]
    return Measured([Series("a batch", "ranks", "s", points)], [Ratio("64 ranks / 1", points[-1][1] / points[0][1], 1.2)])
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

__all__ = ["CURVES", "Cost", "Curve", "Measured", "Ratio", "Series", "cost_of", "cpu_seconds", "curve", "in_process"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Series:
    """Costs at growing sizes."""

    title: str
    size: str
    """what grows, as one word in the plural: rows"""
    unit: str
    """of the costs: s, ms, B"""
    points: Sequence[tuple[float, float]]
    """(size, cost), by size"""

    @property
    def exponents(self) -> list[float]:
        """Slopes between neighboring points in logarithms: 0 is flat, 1 is linear, nan where a cost is 0."""
        logs = [(math.log(size), math.log(cost) if cost > 0 else math.nan) for size, cost in self.points]
        return [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(logs)]

    @property
    def constant(self) -> float:
        """Cost per unit of size at the largest size."""
        size, cost = self.points[-1]
        return cost / size


@dataclass(frozen=True)
class Ratio:
    """A figure of one run that has a limit."""

    title: str
    value: float
    limit: float
    at_least: bool = False
    """true where more is better"""

    @property
    def kept(self) -> bool:
        """True if the limit holds."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Measured:
    """Result of a curve."""

    series: Sequence[Series]
    ratios: Sequence[Ratio] = field(default=())


class Curve(NamedTuple):
    """A registered curve."""

    about: str
    measure: Callable[[bool], Measured]
    """called with True for tiny sizes"""


CURVES: dict[str, Curve] = {}
"""Curves by name."""


def curve(name: str, about: str) -> Callable[[Callable[[bool], Measured]], Callable[[bool], Measured]]:
    """Register a function as the curve `name`."""

    def register(measure: Callable[[bool], Measured]) -> Callable[[bool], Measured]:
        assert name not in CURVES, name
        CURVES[name] = Curve(about, measure)
        return measure

    return register


def cpu_seconds(call: Callable[[], object], repeat: int = 3) -> float:
    """Return the median CPU seconds of this process over `repeat` calls."""
    taken = []
    for _ in range(repeat):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


class Cost(NamedTuple):
    """Cost of a call in its own process."""

    cpu: float
    """seconds"""
    wall: float
    """seconds"""
    memory: float
    """bytes by which the resident set grew at its peak"""


def cost_of(call: Callable[..., object], *arguments: object) -> Cost:
    """Return what `call(*arguments)` takes in this process; best run through `in_process`, where nothing came before."""
    before = _reset_peak()
    started, cpu = time.perf_counter(), time.process_time()
    kept = call(*arguments)  # what it returns stays alive until memory is read
    cost = Cost(time.process_time() - cpu, time.perf_counter() - started, float(_status("VmHWM") - before))
    del kept
    return cost


def in_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Return `function(*arguments)` of a fresh process, so that memory is the call's own; both must pickle."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=1800)


def _reset_peak() -> int:
    """Set the peak of the resident set to its present size, where Linux can; return the present size in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """Return bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
