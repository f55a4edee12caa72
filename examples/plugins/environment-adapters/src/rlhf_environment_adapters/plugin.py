"""The names that this package provides. Nothing heavy is imported."""

from __future__ import annotations

from rlhf_core import Providers, hookimpl

__all__ = ["rlhf_environment"]

HERE = "rlhf_environment_adapters"


@hookimpl
def rlhf_environment() -> Providers:
    return {
        "agent_file": f"{HERE}.agent_file:AgentFile",
        "openenv": f"{HERE}.openenv:OpenEnv",
        "reasoning_gym": f"{HERE}.reasoning_gym:ReasoningGym",
        "textarena": f"{HERE}.textarena:TextArena",
        "tools": f"{HERE}.tools:Tools",
    }
