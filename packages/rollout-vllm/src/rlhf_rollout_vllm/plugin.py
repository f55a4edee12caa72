"""Registers the rollout `vllm`. A name and a string: nothing is imported until it is chosen."""

from __future__ import annotations

from rlhf_core.contract.hooks import Providers, hookimpl

__all__ = ["rlhf_rollout"]


@hookimpl
def rlhf_rollout() -> Providers:
    return {"vllm": "rlhf_rollout_vllm.engine:VLLM"}
