"""`rlhf-run eval MODEL --evaluator NAME`: evaluators on a model that is not trained. Prints one JSON object of metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.checkpoint.own_files import claim_folder
from rlhf_core.contract.commands import Command
from rlhf_core.contract.options import ModelOptions, Sampling
from rlhf_core.contract.ranges import at_least
from rlhf_core.errors import UsageError
from rlhf_core.run.no_training import NoTraining
from rlhf_core.training.planner import make_plan
from rlhf_core.util.places import read_path

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["Evaluate"]


@dataclass(frozen=True)
class Evaluate(Command):
    """Run evaluators on a model without training it, and print their metrics as one JSON object."""

    model: str
    """hub name, folder (OUTPUT/model of a run, or a checkpoint), GGUF file, or `tiny`"""
    output: str = "evaluation"
    """folder for what evaluators write; the folder of a run is allowed, whose own files stay unchanged"""
    seed: int = 0
    """seed of the random draws; the same seed gives the same numbers"""
    max_prompt_tokens: int = 1024
    """longest prompt in tokens; longer prompts are dropped"""
    micro_tokens: int = 8192
    """token budget of one micro-batch, padding included; changes memory and speed, never results"""
    sampling: Sampling = Sampling()
    """sampling options of evaluators that sample"""

    defaults: ClassVar[Mapping[str, str | None]] = {
        "evaluator": "",
        "data": "prompts",
        "reward": None,
        "rollout": "hf",
        "strategy": "torch",
        "launcher": "local",
    }
    roles: ClassVar[Mapping[str, Any]] = {"actor": ModelOptions(), "reference": ModelOptions()}

    def __post_init__(self) -> None:
        at_least(1, self, "max_prompt_tokens", "micro_tokens")
        at_least(0, self, "seed")

    def __call__(self, context: CommandContext) -> int:
        config = context.config
        evaluators = config.providers["evaluator"]
        sampled = any(evaluator.samples for evaluator in evaluators)
        config = replace(config, algorithm=NoTraining(("actor",) if sampled else ()))
        if "reference" in make_plan(config).roles and not config.roles["reference"].model:
            raise UsageError(
                "an evaluator compares the model with a reference; pass --reference.model, for example with the model that "
                "training started from"
            )
        written = [name for each in evaluators for name in each.writes]
        claim_folder(read_path("--output", self.output), written, beside_run=True)
        with context.open_run(config) as run:
            metrics = run.measure()
        print(json.dumps({name: metrics[name] for name in sorted(metrics)}))
        return 0
