"""Providers of core, registered through the same hooks as any plugin's. It has names and strings only: nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_core.contract.hooks import Providers, hookimpl

__all__ = [
    "rlhf_command",
    "rlhf_data",
    "rlhf_environment",
    "rlhf_evaluator",
    "rlhf_filter",
    "rlhf_ingredient",
    "rlhf_launcher",
    "rlhf_metrics",
    "rlhf_observer",
    "rlhf_optimizer",
    "rlhf_output",
    "rlhf_reward",
    "rlhf_rollout",
    "rlhf_sampler",
    "rlhf_strategy",
]


@hookimpl
def rlhf_data() -> Providers:
    return {
        "hf": "rlhf_core.data.hf:HuggingFaceData",
        "json": "rlhf_core.data.json:Json",
        "memory": "rlhf_core.data.memory_rows:MemoryRows",
        "prompts": "rlhf_core.data.prompts:ShippedPrompts",
        "reasoning": "rlhf_core.data.reasoning:ReasoningData",
    }


@hookimpl
def rlhf_sampler() -> Providers:
    return {"shuffled": "rlhf_core.data.shuffling:ShuffledSampler"}


@hookimpl
def rlhf_rollout() -> Providers:
    return {"fake": "rlhf_core.rollout.fake:FakeRollout", "hf": "rlhf_core.rollout.hf:HuggingFaceRollout"}


@hookimpl
def rlhf_environment() -> Providers:
    return {
        "harness": "rlhf_core.endpoint.harness:Harness",
        "python_tool": "rlhf_core.environment.python_tool:PythonTool",
    }


@hookimpl
def rlhf_reward() -> Providers:
    return {
        "code": "rlhf_core.reward.code:Code",
        "environment": "rlhf_core.reward.environment:EnvironmentReward",
        "exact": "rlhf_core.reward.exact:ExactMatch",
        "func": "rlhf_core.reward.func:Func",
        "judge": "rlhf_core.reward.judge:Judge",
        "json": "rlhf_core.reward.valid_json:ValidJson",
        "length": "rlhf_core.reward.length:Length",
        "math": "rlhf_core.reward.maths:Maths",
        "model": "rlhf_core.reward.model:RewardModel",
        "model_role": "rlhf_core.reward.model_role:RewardModelRole",
        "model_roles": "rlhf_core.reward.model_roles:RewardModelRoles",
        "profanity": "rlhf_core.reward.profanity:Profanity",
        "reasoning": "rlhf_core.reward.reasoning:ReasoningReward",
        "regex": "rlhf_core.reward.regex:Regex",
        "remote": "rlhf_core.reward.remote:Remote",
        "sentiment": "rlhf_core.reward.sentiment:Sentiment",
        "sum": "rlhf_core.reward.sum:Sum",
    }


@hookimpl
def rlhf_filter() -> Providers:
    return {"inside": "rlhf_core.training.filters:InsideFilter", "varied": "rlhf_core.training.filters:VariedFilter"}


@hookimpl
def rlhf_strategy() -> Providers:
    return {"fake": "rlhf_core.strategy.fake:FakeStrategy", "torch": "rlhf_core.strategy.torch:TorchStrategy"}


@hookimpl
def rlhf_launcher() -> Providers:
    return {"local": "rlhf_core.launcher.local:Local"}


@hookimpl
def rlhf_evaluator() -> Providers:
    return {
        "heldout": "rlhf_core.evaluator.heldout:Heldout",
        "heldout_loss": "rlhf_core.evaluator.heldout_loss:HeldoutLoss",
        "pass_at_k": "rlhf_core.evaluator.pass_at_k:PassAtK",
        "policy_stats": "rlhf_core.evaluator.policy_stats:PolicyStats",
        "preference": "rlhf_core.evaluator.preference:Preference",
        "win_rate": "rlhf_core.evaluator.win_rate:WinRate",
    }


@hookimpl
def rlhf_observer() -> Providers:
    return {
        "alarm": "rlhf_core.observer.alarm:Alarm",
        "mlflow": "rlhf_core.observer.mlflow:MLflow",
        "tensorboard": "rlhf_core.observer.tensorboard:TensorBoard",
        "wandb": "rlhf_core.observer.wandb:Wandb",
    }


@hookimpl
def rlhf_optimizer() -> Providers:
    return {"adamw": "rlhf_core.contract.optimizers:AdamW"}


@hookimpl
def rlhf_output() -> Providers:
    return {
        "entropy_NT": "rlhf_core.models.heads.outputs:Entropy",
        "features_NH": "rlhf_core.models.heads.outputs:Features",
        "features_NTH": "rlhf_core.models.heads.outputs:TokenFeatures",
        "logits_NT": "rlhf_core.models.heads.outputs:Logits",
        "logprobs_NT": "rlhf_core.models.heads.outputs:Logprobs",
        "scores_N": "rlhf_core.models.heads.outputs:Scores",
        "values_NT": "rlhf_core.models.heads.outputs:Values",
    }


@hookimpl
def rlhf_ingredient() -> Providers:
    return {
        "collect": "rlhf_core.recipe.ingredients.collect:Collect",
        "evaluate": "rlhf_core.recipe.ingredients.evaluate:Evaluate",
        "generate": "rlhf_core.recipe.ingredients.generate:Generate",
        "merge": "rlhf_core.recipe.ingredients.merge:Merge",
        "plot": "rlhf_core.recipe.ingredients.plot:Plot",
        "reward_bench": "rlhf_core.recipe.ingredients.reward_bench:RewardBench",
        "rows": "rlhf_core.recipe.ingredients.rows:Rows",
        "score": "rlhf_core.recipe.ingredients.score:Score",
        "train": "rlhf_core.recipe.ingredients.train:Train",
    }


@hookimpl
def rlhf_command() -> Providers:
    return {
        "chat": "rlhf_core.cli.chat:Chat",
        "compare": "rlhf_core.cli.compare:Compare",
        "curves": "rlhf_core.cli.curves:Curves",
        "diagnose": "rlhf_core.cli.diagnose:Diagnose",
        "doctor": "rlhf_core.cli.doctor:Doctor",
        "eval": "rlhf_core.cli.evaluate:Evaluate",
        "export": "rlhf_core.cli.export:Export",
        "frontier": "rlhf_core.cli.frontier:Frontier",
        "generate": "rlhf_core.cli.generate:Generate",
        "merge-lora": "rlhf_core.cli.merge_lora:MergeLora",
        "new-plugin": "rlhf_core.cli.new_plugin:NewPlugin",
        "plan": "rlhf_core.cli.plan:PlanCommand",
        "plugins": "rlhf_core.cli.plugins:Plugins",
        "recipe": "rlhf_core.cli.recipe:RecipeCommand",
        "replay": "rlhf_core.cli.replay:Replay",
        "report": "rlhf_core.cli.report:Report",
        "score": "rlhf_core.cli.score:Score",
        "serve-reward": "rlhf_core.reward.serve:ServeReward",
        "simulate": "rlhf_core.cli.simulate:Simulate",
        "sweep": "rlhf_core.cli.sweep:Sweep",
        "translate": "rlhf_core.cli.translate:Translate",
    }


@hookimpl
def rlhf_metrics() -> Mapping[str, str]:
    from rlhf_core.plugins.metric_catalogue import METRICS

    return METRICS
