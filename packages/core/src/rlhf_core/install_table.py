"""Which sibling distribution provides which name. Written by tools/install_table.py: do not edit."""

from __future__ import annotations

__all__ = ["INSTALL"]

INSTALL: dict[str, dict[str, str]] = {
    "advantage": {
        "gae": "rlhf-algos",
        "grpo": "rlhf-algos",
        "reinforce_pp": "rlhf-algos",
        "rloo": "rlhf-algos",
    },
    "algorithm": {
        "dpo": "rlhf-algos",
        "grpo": "rlhf-algos",
        "ppo": "rlhf-algos",
        "reinforce_pp": "rlhf-algos",
        "reward": "rlhf-algos",
        "rloo": "rlhf-algos",
        "sft": "rlhf-algos",
    },
    "evaluator": {
        "gcg": "rlhf-eval-gcg",
    },
    "launcher": {
        "ray": "rlhf-distributed-ray",
    },
    "loss": {
        "bradley_terry": "rlhf-algos",
        "clip": "rlhf-algos",
        "dpo": "rlhf-algos",
        "entropy": "rlhf-algos",
        "grpo": "rlhf-algos",
        "reinforce": "rlhf-algos",
        "sft": "rlhf-algos",
        "value": "rlhf-algos",
    },
    "rollout": {
        "vllm": "rlhf-rollout-vllm",
    },
    "strategy": {
        "deepspeed": "rlhf-strategy-deepspeed",
    },
}
