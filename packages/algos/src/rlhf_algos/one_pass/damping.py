"""Schedules of the damping: the ridge lambda_t that stands for past curvature where none is kept.

The paper's schedule (Li et al. 2025, section 6) is lambda_t = lambda_0 min(1, f(t / T)) with an increasing f. It grows from 0
to lambda_0 and stays. The released code's schedule grows from lambda_0 to 1, and only closes a gate (`released_damping`).
"""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["Strategy", "damping_at", "released_damping"]

Strategy = Literal["constant", "linear", "log", "square", "cosine"]


def damping_at(strategy: Strategy, damping: float, growth: float, step: int, total: int) -> float:
    """Return lambda_t of the paper at `step`, counted from 1; 0..damping.

    Args:
        strategy: f: 1, x, log2(1 + x), x^2, or (1 - cos(pi x)) / 2, all of which reach 1 at x = 1 and stay there.
        damping: lambda_0, the final value.
        growth: steps until then; up to 1, `total` is taken.
        step: t, from 1.
        total: T, the steps of the whole run.
    """
    x = min(1.0, step / (growth if growth > 1 else max(1, total)))
    share = {
        "constant": 1.0,
        "linear": x,
        "log": math.log2(1 + x),
        "square": x * x,
        "cosine": (1 - math.cos(math.pi * x)) / 2,
    }
    return damping * share[strategy]


def released_damping(strategy: Strategy, damping: float, growth: float, step: int, total: int) -> float:
    """Return the number of the released code at `step`, counted from 1; it takes the second-order step while this is below 1.

    `cosine` is periodic: the gate opens again after x = 1. `constant` stays below 1 until then.
    """
    x = step / (growth if growth > 1 else max(1, total))
    value = {
        "constant": damping if x < 1 else 1.0,
        "linear": (1 - damping) * x + damping,
        "log": damping * (1 + math.log(1 + x)),
        "square": damping * (1 + x * x),
        "cosine": damping * (2 - math.cos(math.pi * x)),
    }
    return min(1.0, value[strategy])
