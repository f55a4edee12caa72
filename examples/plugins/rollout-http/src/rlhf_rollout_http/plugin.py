"""The name that this package provides, and the metrics that it logs. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_core import Providers, hookimpl

__all__ = ["rlhf_metrics", "rlhf_rollout"]


@hookimpl
def rlhf_rollout() -> Providers:
    return {"http": "rlhf_rollout_http.rollout:HttpRollout"}


@hookimpl
def rlhf_metrics() -> Mapping[str, str]:
    return {
        "sync/sent_bytes": "bytes: weights that the engine `http` sent to its server after an update",
        "sync/sent_seconds": "seconds: time that sending them took",
    }
