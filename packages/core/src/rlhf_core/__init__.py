"""A plugin host for RLHF: one loop, one contract, and everything with a choice in it is a plugin.

A plugin needs `hookimpl` and the types its kind is called with; a script needs `Run` and `make_config`:

    from rlhf_core import Run, make_config

    run = Run(make_config("grpo", model="tiny", reward="length", steps=20, output="runs/first"))
    run.train()

Names are imported when they are used, so that `import rlhf_core` costs nothing and brings no torch. What is not listed
here is private and may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_core.configure import make as make_config
    from rlhf_core.errors import (
        ContractError,
        DataError,
        MissingPackage,
        NameConflict,
        PluginError,
        RlhfError,
        RunStopped,
        UnknownName,
        UsageError,
    )
    from rlhf_core.hookspecs import Providers, hookimpl
    from rlhf_core.options import KL, Lora, ModelOptions, Optim, RunConfig, Sampling, TrainedOptions
    from rlhf_core.registry import Registry
    from rlhf_core.run import Run
    from rlhf_core.types import (
        Batch,
        Chosen,
        Credit,
        Example,
        LossTerms,
        Metric,
        Outputs,
        Prompts,
        Reduction,
        RewardOutput,
        Rollouts,
        Term,
    )
    from rlhf_core.values import Secret, reveal

__all__ = [
    "KL",
    "Batch",
    "Chosen",
    "ContractError",
    "Credit",
    "DataError",
    "Example",
    "Lora",
    "LossTerms",
    "Metric",
    "MissingPackage",
    "ModelOptions",
    "NameConflict",
    "Optim",
    "Outputs",
    "PluginError",
    "Prompts",
    "Providers",
    "Reduction",
    "Registry",
    "RewardOutput",
    "RlhfError",
    "Rollouts",
    "Run",
    "RunConfig",
    "RunStopped",
    "Sampling",
    "Secret",
    "Term",
    "TrainedOptions",
    "UnknownName",
    "UsageError",
    "hookimpl",
    "make_config",
    "reveal",
]

_HOMES = {
    "errors": (
        "ContractError DataError MissingPackage NameConflict PluginError RlhfError RunStopped UnknownName UsageError"
    ),
    "hookspecs": "Providers hookimpl",
    "options": "KL Lora ModelOptions Optim RunConfig Sampling TrainedOptions",
    "registry": "Registry",
    "run": "Run",
    "types": "Batch Chosen Credit Example LossTerms Metric Outputs Prompts Reduction RewardOutput Rollouts Term",
    "values": "Secret reveal",
}
"""The module of each public name that is called the same there."""


def __getattr__(name: str) -> Any:
    if name == "make_config":
        return import_module("rlhf_core.configure").make
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"rlhf_core.{module}"), name)
    raise AttributeError(f"module 'rlhf_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
