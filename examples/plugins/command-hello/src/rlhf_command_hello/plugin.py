"""The names that this package provides. Nothing heavy is imported."""

from __future__ import annotations

from rlhf_core import Providers, hookimpl

__all__ = ["rlhf_command"]


@hookimpl
def rlhf_command() -> Providers:
    return {
        "hello": "rlhf_command_hello.commands:Hello",
        "likelihood": "rlhf_command_hello.commands:Likelihood",
    }
