"""What core itself provides, through the same hooks as everybody else. Names and strings: nothing is imported here."""

from __future__ import annotations

from rlhf_core.hookspecs import Providers, hookimpl

__all__ = ["rlhf_data", "rlhf_evaluator", "rlhf_launcher", "rlhf_reward", "rlhf_rollout", "rlhf_strategy"]


@hookimpl
def rlhf_data() -> Providers:
    return {
        "hf": "rlhf_core.data.hf:HuggingFace",
        "json": "rlhf_core.data.json:Json",
        "prompts": "rlhf_core.data.prompts:ShippedPrompts",
    }


@hookimpl
def rlhf_rollout() -> Providers:
    return {"hf": "rlhf_core.rollout.hf:HuggingFace"}


@hookimpl
def rlhf_reward() -> Providers:
    return {
        "func": "rlhf_core.reward.func:Func",
        "length": "rlhf_core.reward.length:Length",
        "sentiment": "rlhf_core.reward.sentiment:Sentiment",
    }


@hookimpl
def rlhf_strategy() -> Providers:
    return {"torch": "rlhf_core.strategy.torch:TorchStrategy"}


@hookimpl
def rlhf_launcher() -> Providers:
    return {"local": "rlhf_core.launcher.local:Local"}


@hookimpl
def rlhf_evaluator() -> Providers:
    return {"heldout": "rlhf_core.evaluator.heldout:Heldout"}
