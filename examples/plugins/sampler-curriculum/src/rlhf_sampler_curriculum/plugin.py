"""The name that this package provides. Nothing heavy is imported."""

from __future__ import annotations

from rlhf_core import Providers, hookimpl

__all__ = ["rlhf_sampler"]


@hookimpl
def rlhf_sampler() -> Providers:
    return {"curriculum": "rlhf_sampler_curriculum.curriculum:Curriculum"}
