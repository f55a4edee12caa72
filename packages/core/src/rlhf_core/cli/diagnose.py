"""`rlhf-run diagnose MODEL --rollout NAME`: does the engine compute what the trainer computes, and if not, why?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, cast

from rlhf_core.contract.commands import Command
from rlhf_core.contract.options import ModelOptions, Sampling
from rlhf_core.contract.ranges import at_least
from rlhf_core.errors import UsageError

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.run.run import Run

__all__ = ["Diagnose"]


@dataclass(frozen=True)
class Diagnose(Command):
    """Compare a rollout engine with the trainer token by token, before and after a change of weights, and name the cause."""

    model: str
    """hub name, folder, GGUF file, or `tiny`"""
    _: KW_ONLY
    prompts: int = 8
    """number of prompts to answer"""
    tokens: int = 24
    """number of tokens per answer"""
    max_difference: float = 0.0
    """largest mean difference at which both agree, in nats per token; 0 takes 0.001 in float32 and 0.05 in 16 bits"""
    seed: int = 0
    """seed of the random draws; the same seed gives the same answers"""
    max_prompt_tokens: int = 1024
    """longest prompt in tokens; longer prompts are dropped"""

    defaults: ClassVar[Mapping[str, str | None]] = {
        "data": "prompts",
        "rollout": "hf",
        "strategy": "torch",
        "launcher": "local",
    }
    roles: ClassVar[Mapping[str, Any]] = {"actor": ModelOptions()}

    def __post_init__(self) -> None:
        at_least(1, self, "prompts", "tokens", "max_prompt_tokens")
        at_least(0, self, "seed", "max_difference")

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.run.diagnosing import Examination

        with context.open_run() as opened:
            run = cast("Run", opened)
            rows = list(islice(run.rows("train"), self.prompts))
            prompts = run.encoder.fitting_prompts(rows, list(range(len(rows))))
            if not len(prompts):
                raise UsageError("every prompt is too long; raise --max-prompt-tokens, or name other data")
            sampling = Sampling(n=1, max_new_tokens=self.tokens, seed=self.seed)
            examination = Examination(run, prompts, sampling, self.max_difference)
            findings = {"as loaded": examination.compare(), "after new weights": examination.compare_after_change()}
        for when, finding in findings.items():
            if finding.cause:
                left = f", {finding.after:.2g} with it" if finding.after < finding.before else ""
                print(f"{when}: {finding.before:.2g} nats per token apart{left}")
                print(f"  cause: {finding.cause}\n  {finding.detail}")
            else:
                print(f"{when}: agree within {finding.before:.2g} nats per token")
        return int(any(finding.cause for finding in findings.values()))
