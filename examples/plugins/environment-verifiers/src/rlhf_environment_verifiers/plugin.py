"""The names that this package provides. Nothing heavy is imported."""

from __future__ import annotations

from rlhf_core import Providers, hookimpl

__all__ = ["rlhf_environment"]


@hookimpl
def rlhf_environment() -> Providers:
    return {"verifiers": "rlhf_environment_verifiers.environment:Verifiers"}
