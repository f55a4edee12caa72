"""Registers the evaluator `gcg`. A name and a string: nothing is imported until it is chosen."""

from __future__ import annotations

from rlhf_core.contract.hooks import Providers, hookimpl

__all__ = ["rlhf_evaluator"]


@hookimpl
def rlhf_evaluator() -> Providers:
    return {"gcg": "rlhf_eval_gcg.gcg:GCG"}
