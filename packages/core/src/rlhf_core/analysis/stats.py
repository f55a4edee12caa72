"""Statistics over seeds and over samples: t-intervals, bootstrap intervals, CVaR, and which points no other beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["bootstrap_interval", "cvar", "pareto", "share_below", "t_interval", "t_quantile"]

Numbers = Sequence[float] | np.ndarray[Any, Any]


def share_below(rewards: Numbers, threshold: float) -> float:
    """The share of rewards strictly below `threshold`: the probability of a bad output."""
    return float((np.asarray(rewards, dtype=np.float64) < threshold).mean())


def cvar(rewards: Numbers, share: float) -> float:
    """Conditional value at risk: the mean of the lowest `share` of the rewards, of at least one of them."""
    worst = np.sort(np.asarray(rewards, dtype=np.float64))
    return float(worst[: max(1, math.floor(share * len(worst) + 1e-9))].mean())  # 1e-9: 1e-4 * 50000 is not 5.0


def bootstrap_interval(values: Numbers, seed: int = 0, draws: int = 5000, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean: seeds are drawn with replacement. One value gives no width."""
    known = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(known), size=(draws, len(known)))
    low, high = np.quantile(known[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_interval(values: Numbers, level: float = 0.95) -> tuple[float, float]:
    """The mean and the half width of Student's interval, from the sample standard deviation; 0 for one value."""
    known = np.asarray(values, dtype=np.float64)
    if len(known) < 2:
        return float(known.mean()), 0.0
    error = float(known.std(ddof=1)) / math.sqrt(len(known))
    return float(known.mean()), t_quantile(0.5 + level / 2, len(known) - 1) * error


def t_quantile(probability: float, freedom: int) -> float:
    """Student's quantile for a probability of at least one half and whole degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while _t_two_sided(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_two_sided(middle, freedom) < 2 * probability - 1 else (low, middle)
    return low


def _t_two_sided(t: float, freedom: int) -> float:
    """P(|T| < t): the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cos2, odd = math.cos(angle) ** 2, freedom % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * cos2
        total += term
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Mark the points on the Pareto front: no other point is as high in both numbers and higher in one."""
    return [not any(_beats(other, point) for other in points) for point in points]


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a != b
