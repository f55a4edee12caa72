"""The names that this package provides. Nothing heavy is imported."""

from __future__ import annotations

from rlhf_core import Providers, hookimpl

__all__ = ["rlhf_algorithm", "rlhf_metrics"]


@hookimpl
def rlhf_algorithm() -> Providers:
    return {"prime": "rlhf_algorithm_prime.algorithm:Prime"}


@hookimpl
def rlhf_metrics() -> dict[str, str]:
    return {"prm/accuracy": "share 0..1: of completions whose implicit reward has the sign of their outcome"}
