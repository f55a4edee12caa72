"""Registers the strategy `deepspeed`. A name and a string: nothing is imported until it is chosen."""

from __future__ import annotations

from rlhf_core.contract.hooks import Providers, hookimpl

__all__ = ["rlhf_strategy"]


@hookimpl
def rlhf_strategy() -> Providers:
    return {"deepspeed": "rlhf_strategy_deepspeed.strategy:DeepSpeed"}
