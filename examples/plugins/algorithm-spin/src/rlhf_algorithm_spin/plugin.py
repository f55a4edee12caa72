"""The names that this package provides. Nothing heavy is imported."""

from __future__ import annotations

from rlhf_core import Providers, hookimpl

__all__ = ["rlhf_algorithm", "rlhf_metrics"]


@hookimpl
def rlhf_algorithm() -> Providers:
    return {"spin": "rlhf_algorithm_spin.algorithm:SPIN"}


@hookimpl
def rlhf_metrics() -> dict[str, str]:
    return {
        "actor/margin": "nats: log-ratio to the opponent of a demonstration less that of a sample, times lam",
        "actor/accuracy": "share 0..1: of pairs whose margin is above 0",
    }
