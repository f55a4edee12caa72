"""The provider that this package registers."""

from __future__ import annotations

from rlhf_core import Providers, hookimpl


@hookimpl
def rlhf_strategy() -> Providers:
    return {"fsdp2": "rlhf_strategy_fsdp2.strategy:FSDP2"}
