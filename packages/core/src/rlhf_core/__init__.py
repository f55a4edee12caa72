"""A plugin host for RLHF: one loop, one contract, and everything with a choice in it is a plugin.

A plugin needs `hookimpl` and the types its kind is called with; a script needs `Run` and `make_config`:

    from rlhf_core import Run, make_config

    run = Run(make_config("grpo", model="tiny", reward="length", steps=20, output="runs/first"))
    run.train()

Names are imported when they are used, so that `import rlhf_core` costs nothing and brings no torch. Names that are not listed
here is private and may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_core.config.builder import make_config
    from rlhf_core.config.provider_spec import make_from_spec
    from rlhf_core.config.value_types import Secret, reveal
    from rlhf_core.contract.batch import Batch, Example, Message, Prompts, Rollouts, StepInfo
    from rlhf_core.contract.commands import Command, CommandContext
    from rlhf_core.contract.distributed import TorchWorld, World
    from rlhf_core.contract.driving import EpisodeOver, Outcome, Policy, Reply
    from rlhf_core.contract.engines import Closeable, OpenContext, Stateful, open_provider
    from rlhf_core.contract.episode import Action, Feedback, Session
    from rlhf_core.contract.hooks import Providers, hookimpl
    from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
    from rlhf_core.contract.memory import ModelSize, RoleMemory, SamplingLoad
    from rlhf_core.contract.optimizers import AdamW, OptimizerProvider, StepClosure, parameter_groups
    from rlhf_core.contract.options import (
        KL,
        EpisodeLimits,
        Lora,
        ModelOptions,
        RunConfig,
        Sampling,
        Tracking,
        TrackingOptions,
        TrainedOptions,
    )
    from rlhf_core.contract.outputs import Output, States
    from rlhf_core.contract.plan import CreditSpec, Plan, RoleSpec
    from rlhf_core.contract.providers import (
        Advantage,
        Algorithm,
        Data,
        Environment,
        Evaluator,
        Launcher,
        Loss,
        Observer,
        Reward,
        Rollout,
        Strategy,
    )
    from rlhf_core.contract.results import Credit, LossTerms, Metric, Outputs, Reduction, RewardOutput
    from rlhf_core.contract.roles import Placement, Role, SecondOrderTrainable, Trainable
    from rlhf_core.contract.run_view import RowEncoder, RunView
    from rlhf_core.contract.selection import Filter, Sampler
    from rlhf_core.contract.terms import ProviderChoices, Term
    from rlhf_core.endpoint.harness import Harness
    from rlhf_core.errors import (
        ContractError,
        DataError,
        MissingPackage,
        NameConflict,
        OptionError,
        PluginError,
        RlhfError,
        RunStopped,
        UnknownName,
        UsageError,
        advice,
        option,
        options_under,
        run_option,
    )
    from rlhf_core.models.inputs.arrange import arrange_inputs
    from rlhf_core.models.loading.end_tokens import end_ids
    from rlhf_core.models.loading.limits import lacking_ids
    from rlhf_core.models.module import RoleModule
    from rlhf_core.observer.tracker import Tracker
    from rlhf_core.plugins.registry import Registry
    from rlhf_core.recipe.engine import run_recipe
    from rlhf_core.recipe.plan import Recipe
    from rlhf_core.recipe.reading import read_recipe
    from rlhf_core.reward.output import to_reward_output
    from rlhf_core.rollout.assemble import assemble
    from rlhf_core.run.result import RunResult
    from rlhf_core.run.run import Run
    from rlhf_core.run.simple import RLHFConfig, RLHFPipeline
    from rlhf_core.strategy.shared_base import SharedBase
    from rlhf_core.training.dynamic_sampling import DynamicSampling
    from rlhf_core.training.observation import ClippedClosure
    from rlhf_core.training.optimizer import Schedule, load_optimizer, lr_factor, make_optimizer
    from rlhf_core.training.reward_shaping import RewardShaping
    from rlhf_core.util.padding import pad_rows

__all__ = [
    "KL",
    "Action",
    "AdamW",
    "Advantage",
    "Algorithm",
    "Artifact",
    "ArtifactKind",
    "Batch",
    "ClippedClosure",
    "Closeable",
    "Command",
    "CommandContext",
    "ContractError",
    "Credit",
    "CreditSpec",
    "Data",
    "DataError",
    "DynamicSampling",
    "Environment",
    "EpisodeLimits",
    "EpisodeOver",
    "Evaluator",
    "Example",
    "Feedback",
    "Filter",
    "Harness",
    "Ingredient",
    "IngredientContext",
    "Launcher",
    "Lora",
    "Loss",
    "LossTerms",
    "Message",
    "Metric",
    "MissingPackage",
    "ModelOptions",
    "ModelSize",
    "NameConflict",
    "Observer",
    "OpenContext",
    "OptimizerProvider",
    "OptionError",
    "Outcome",
    "Output",
    "Outputs",
    "Placement",
    "Plan",
    "PluginError",
    "Policy",
    "Prompts",
    "ProviderChoices",
    "Providers",
    "RLHFConfig",
    "RLHFPipeline",
    "Recipe",
    "Reduction",
    "Registry",
    "Reply",
    "Reward",
    "RewardOutput",
    "RewardShaping",
    "RlhfError",
    "Role",
    "RoleMemory",
    "RoleModule",
    "RoleSpec",
    "Rollout",
    "Rollouts",
    "RowEncoder",
    "Run",
    "RunConfig",
    "RunResult",
    "RunStopped",
    "RunView",
    "Sampler",
    "Sampling",
    "SamplingLoad",
    "Schedule",
    "SecondOrderTrainable",
    "Secret",
    "Session",
    "SharedBase",
    "Stateful",
    "States",
    "StepClosure",
    "StepInfo",
    "Strategy",
    "Term",
    "TorchWorld",
    "Tracker",
    "Tracking",
    "TrackingOptions",
    "Trainable",
    "TrainedOptions",
    "UnknownName",
    "UsageError",
    "World",
    "advice",
    "arrange_inputs",
    "assemble",
    "end_ids",
    "hookimpl",
    "lacking_ids",
    "load_optimizer",
    "lr_factor",
    "make_config",
    "make_from_spec",
    "make_optimizer",
    "open_provider",
    "option",
    "options_under",
    "pad_rows",
    "parameter_groups",
    "read_recipe",
    "reveal",
    "run_option",
    "run_recipe",
    "to_reward_output",
]

_HOMES = {
    "config.builder": "make_config",
    "config.provider_spec": "make_from_spec",
    "config.value_types": "Secret reveal",
    "contract.batch": "Batch Example Message Prompts Rollouts StepInfo",
    "contract.commands": "Command CommandContext",
    "contract.distributed": "TorchWorld World",
    "contract.driving": "EpisodeOver Outcome Policy Reply",
    "contract.engines": "Closeable OpenContext Stateful open_provider",
    "contract.episode": "Action Feedback Session",
    "contract.hooks": "Providers hookimpl",
    "contract.ingredients": "Artifact ArtifactKind Ingredient IngredientContext",
    "contract.optimizers": "AdamW OptimizerProvider StepClosure parameter_groups",
    "contract.memory": "ModelSize RoleMemory SamplingLoad",
    "contract.options": "KL EpisodeLimits Lora ModelOptions RunConfig Sampling Tracking TrackingOptions TrainedOptions",
    "contract.outputs": "Output States",
    "contract.plan": "CreditSpec Plan RoleSpec",
    "contract.providers": "Advantage Algorithm Data Environment Evaluator Launcher Loss Observer Reward Rollout Strategy",
    "contract.results": "Credit LossTerms Metric Outputs Reduction RewardOutput",
    "contract.roles": "Placement Role SecondOrderTrainable Trainable",
    "contract.run_view": "RowEncoder RunView",
    "contract.selection": "Filter Sampler",
    "contract.terms": "ProviderChoices Term",
    "endpoint.harness": "Harness",
    "errors": (
        "ContractError DataError MissingPackage NameConflict OptionError PluginError RlhfError RunStopped "
        "UnknownName UsageError advice option options_under run_option"
    ),
    "models.inputs.arrange": "arrange_inputs",
    "models.loading.end_tokens": "end_ids",
    "models.loading.limits": "lacking_ids",
    "models.module": "RoleModule",
    "observer.tracker": "Tracker",
    "plugins.registry": "Registry",
    "recipe.engine": "run_recipe",
    "recipe.plan": "Recipe",
    "recipe.reading": "read_recipe",
    "reward.output": "to_reward_output",
    "rollout.assemble": "assemble",
    "run.result": "RunResult",
    "run.run": "Run",
    "run.simple": "RLHFConfig RLHFPipeline",
    "strategy.shared_base": "SharedBase",
    "training.dynamic_sampling": "DynamicSampling",
    "training.observation": "ClippedClosure",
    "training.optimizer": "Schedule load_optimizer lr_factor make_optimizer",
    "training.reward_shaping": "RewardShaping",
    "util.padding": "pad_rows",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"rlhf_core.{module}"), name)
    raise AttributeError(f"module 'rlhf_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
