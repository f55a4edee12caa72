"""A rollout engine with one slow prompt, for tests and benchmarks of the scheduler: `rlhf_core.testing.straggler:Straggler`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from rlhf_core.lazy import torch
from rlhf_core.rollout.assemble import assemble
from rlhf_core.rollout.fake import FakeEngine, FakeRollout, Letters
from rlhf_core.util.clock import sleep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_core.contract.batch import Prompts, Rollouts
    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.contract.options import Sampling
    from rlhf_core.contract.roles import Role

__all__ = ["Straggler"]


@dataclass(frozen=True)
class Straggler(FakeRollout):
    """The engine `fake` with completions of one length, but for those of one row of the data."""

    length: int = 4
    """tokens of a completion"""
    slow_row: int = 0
    """the row whose completions are longer"""
    factor: int = 10
    """factor on the length"""

    def open(self, context: OpenContext) -> StragglerEngine:
        """Return an engine that has no weights yet."""
        return StragglerEngine(self)


class StragglerEngine(FakeEngine):
    """State of the engine: the weights, and the length of each prompt at its first request.

    Args:
        options: lengths and times.
    """

    def __init__(self, options: Straggler) -> None:
        super().__init__(options)
        self.straggler = options
        self.prompts: dict[int, int] = {}

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Return `a`s, as many as are left of each completion."""
        if self.w is None:
            self.sync(role)
        limits = prompts.limits or [sampling.max_new_tokens] * len(prompts)
        tokens, finish = [], []
        for example, ids, limit in zip(prompts.examples, prompts.token_ids, limits, strict=True):
            options = self.straggler
            whole = options.length * (options.factor if example.row == options.slow_row else 1)
            left = whole - (len(ids) - self.prompts.setdefault(example.row, len(ids)))
            tokens += [torch.ones(min(left, limit), dtype=torch.int64)] * sampling.n
            finish += ["stop" if left <= limit else "length"] * sampling.n
        sleep(self.options.token_seconds * max(map(len, tokens)))
        assert self.w is not None
        return assemble(
            prompts,
            tokens,
            cast("Any", finish),
            cast("PreTrainedTokenizerBase", Letters()),
            version=self.version,
            per_token={"sampler_logprobs_NT": [self.w - 2 * torch.ones(len(row)) for row in tokens]},
        )
