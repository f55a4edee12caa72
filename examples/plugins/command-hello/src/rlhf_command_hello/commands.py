"""A command without providers, and a command that asks a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_core import Command, CommandContext, Example, ModelOptions, UsageError

__all__ = ["Hello", "Likelihood"]


@dataclass(frozen=True)
class Hello(Command):
    """Greet somebody."""

    name: str
    """the person to greet"""
    times: int = 1
    """number of greetings"""

    def __call__(self, context: CommandContext) -> int:
        if self.times < 1:
            raise UsageError(f"--times must be at least 1, not {self.times}")
        for _ in range(self.times):
            print(f"Hello, {self.name}!")
        return 0


@dataclass(frozen=True)
class Likelihood(Command):
    """Print the mean log-probability of a completion under a model, as one JSON object."""

    prompt: str
    """the text before the completion"""
    completion: str
    """the text whose tokens are scored"""
    model: str = "tiny"
    """hub name, folder, or `tiny`"""
    max_prompt_tokens: int = 1024
    """longer prompts are refused"""

    defaults: ClassVar[Mapping[str, str | None]] = {
        "data": "prompts",
        "rollout": "hf",
        "strategy": "torch",
        "launcher": "local",
    }
    roles: ClassVar[Mapping[str, ModelOptions]] = {"actor": ModelOptions()}

    def __call__(self, context: CommandContext) -> int:
        row = Example(self.prompt, (self.completion,))
        with context.open_run() as run:
            if not run.encoder.fits_prompt(row):
                raise UsageError(f"the prompt is longer than --max-prompt-tokens {self.max_prompt_tokens}; raise it")
            batch = run.encoder.batch([row], [0])
            logprobs_NT = run.roles["actor"].infer(batch, frozenset({"logprobs_NT"}))["logprobs_NT"]
            mean = float(logprobs_NT[batch.mask_NT].mean())
        print(json.dumps({"mean_logprob": mean, "tokens": int(batch.mask_NT.sum())}))
        return 0
