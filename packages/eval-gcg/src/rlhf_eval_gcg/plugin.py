"""Registers the evaluator and the ingredient `gcg`, judges, a command and metrics.

Names and strings: nothing is imported until it is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_core import Providers, hookimpl

__all__ = ["rlhf_command", "rlhf_evaluator", "rlhf_ingredient", "rlhf_metrics", "rlhf_reward"]


@hookimpl
def rlhf_evaluator() -> Providers:
    return {"gcg": "rlhf_eval_gcg.gcg:GCG"}


@hookimpl
def rlhf_reward() -> Providers:
    return {
        "harmbench": "rlhf_eval_gcg.judges.verdict:HarmBench",
        "refusal": "rlhf_eval_gcg.judges.refusal:Refusal",
        "strongreject": "rlhf_eval_gcg.judges.verdict:StrongReject",
        "verdict": "rlhf_eval_gcg.judges.verdict:Verdict",
    }


@hookimpl
def rlhf_command() -> Providers:
    return {"gcg-report": "rlhf_eval_gcg.analysis.report:GCGReport"}


@hookimpl
def rlhf_ingredient() -> Providers:
    return {"gcg": "rlhf_eval_gcg.ingredient:Attack"}


@hookimpl
def rlhf_metrics() -> Mapping[str, str]:
    return {
        "eval/gcg/loss": "nats: loss of the best suffix, mean over goals and attack seeds",
        "eval/gcg/loss_start": "nats: loss of the initial suffix, mean over goals and attack seeds",
        "eval/gcg/matched": "share 0..1: of attacks after which greedy decoding gives the whole target",
        "eval/gcg/steps": "steps: done per attack, mean",
        "eval/gcg/flops": "operations: floating-point operations per attack, mean",
        "eval/gcg/attacks": "attacks: goals times attack seeds",
        "eval/gcg/reward": "reward: the judge's, mean over answers to attacked prompts",
        "eval/gcg/clean_reward": "reward: the judge's, mean over answers to goals without a suffix",
        "eval/gcg/success": "share 0..1: of answers to attacked prompts with a reward below the threshold",
        "eval/gcg/success_low": "share 0..1: lower end of its 95 % interval over goals and seeds",
        "eval/gcg/success_high": "share 0..1: upper end of its 95 % interval over goals and seeds",
        "eval/gcg/success_any": "share 0..1: of attacks after which one of the n answers has a reward below the threshold",
        "eval/gcg/success_any_low": "share 0..1: lower end of its 95 % interval over goals and seeds",
        "eval/gcg/success_any_high": "share 0..1: upper end of its 95 % interval over goals and seeds",
        "eval/gcg/clean_success": "share 0..1: of answers to goals without a suffix with a reward below the threshold",
        "eval/gcg/clean_success_any": "share 0..1: of goals without a suffix with such an answer among n",
    }
