"""The names that this package provides. Nothing heavy is imported."""

from __future__ import annotations

from rlhf_core import Providers, hookimpl

__all__ = ["rlhf_optimizer"]


@hookimpl
def rlhf_optimizer() -> Providers:
    return {"muon": "rlhf_optimizer_muon.provider:Muon"}
