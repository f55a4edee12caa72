"""Registers what this package supplies. Names and strings: nothing is imported until it is chosen."""

from __future__ import annotations

from rlhf_core.hookspecs import Providers, hookimpl

__all__ = ["rlhf_advantage", "rlhf_algorithm", "rlhf_loss"]


@hookimpl
def rlhf_advantage() -> Providers:
    return {
        "gae": "rlhf_algos.advantage.gae:GAE",
        "grpo": "rlhf_algos.advantage.grpo:GRPO",
        "reinforce_pp": "rlhf_algos.advantage.reinforce_pp:ReinforcePP",
        "rloo": "rlhf_algos.advantage.rloo:RLOO",
    }


@hookimpl
def rlhf_loss() -> Providers:
    return {
        "bradley_terry": "rlhf_algos.loss.bradley_terry:BradleyTerry",
        "clip": "rlhf_algos.loss.clip:Clip",
        "dpo": "rlhf_algos.loss.dpo:DPO",
        "entropy": "rlhf_algos.loss.entropy:Entropy",
        "grpo": "rlhf_algos.loss.grpo:GRPO",
        "reinforce": "rlhf_algos.loss.reinforce:Reinforce",
        "sft": "rlhf_algos.loss.sft:SFT",
        "value": "rlhf_algos.loss.value:Value",
    }


@hookimpl
def rlhf_algorithm() -> Providers:
    return {
        "dpo": "rlhf_algos.algorithm.dpo:DPO",
        "grpo": "rlhf_algos.algorithm.grpo:GRPO",
        "ppo": "rlhf_algos.algorithm.ppo:PPO",
        "reinforce_pp": "rlhf_algos.algorithm.reinforce_pp:ReinforcePP",
        "reward": "rlhf_algos.algorithm.reward:RewardModel",
        "rloo": "rlhf_algos.algorithm.rloo:RLOO",
        "sft": "rlhf_algos.algorithm.sft:SFT",
    }
