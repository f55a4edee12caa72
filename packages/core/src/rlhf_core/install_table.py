"""Which sibling distribution provides which name. Written by tools/install_table.py: do not edit."""

from __future__ import annotations

__all__ = ["INSTALL"]

INSTALL: dict[str, dict[str, str]] = {
    "advantage": {
        "batch_mean": "rlhf-algos",
        "best_of_n": "rlhf-algos",
        "dr_grpo": "rlhf-algos",
        "gae": "rlhf-algos",
        "grpo": "rlhf-algos",
        "pairs": "rlhf-algos",
        "reinforce": "rlhf-algos",
        "reinforce_pp": "rlhf-algos",
        "reinforce_pp_baseline": "rlhf-algos",
        "rloo": "rlhf-algos",
    },
    "algorithm": {
        "cdpo": "rlhf-algos",
        "cispo": "rlhf-algos",
        "dapo": "rlhf-algos",
        "dpo": "rlhf-algos",
        "dr_grpo": "rlhf-algos",
        "grpo": "rlhf-algos",
        "gspo": "rlhf-algos",
        "ipo": "rlhf-algos",
        "online_dpo": "rlhf-algos",
        "orpo": "rlhf-algos",
        "ppo": "rlhf-algos",
        "reinforce": "rlhf-algos",
        "reinforce_pp": "rlhf-algos",
        "reinforce_pp_baseline": "rlhf-algos",
        "rejection_sampling": "rlhf-algos",
        "reward": "rlhf-algos",
        "rloo": "rlhf-algos",
        "sft": "rlhf-algos",
        "simpo": "rlhf-algos",
    },
    "evaluator": {
        "gcg": "rlhf-eval-gcg",
    },
    "launcher": {
        "ray": "rlhf-distributed-ray",
    },
    "loss": {
        "bradley_terry": "rlhf-algos",
        "cdpo": "rlhf-algos",
        "chosen_nll": "rlhf-algos",
        "cispo": "rlhf-algos",
        "clip": "rlhf-algos",
        "dapo": "rlhf-algos",
        "dpo": "rlhf-algos",
        "dr_grpo": "rlhf-algos",
        "entropy": "rlhf-algos",
        "grpo": "rlhf-algos",
        "gspo": "rlhf-algos",
        "hinge": "rlhf-algos",
        "ipo": "rlhf-algos",
        "orpo": "rlhf-algos",
        "reinforce": "rlhf-algos",
        "robust": "rlhf-algos",
        "sft": "rlhf-algos",
        "simpo": "rlhf-algos",
        "value": "rlhf-algos",
    },
    "rollout": {
        "vllm": "rlhf-rollout-vllm",
    },
    "strategy": {
        "deepspeed": "rlhf-strategy-deepspeed",
    },
}
