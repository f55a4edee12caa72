"""A reward that remembers what it has seen, for tests of runs that are cut: what it gives depends on all calls before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.engines import OpenContext
from rlhf_core.contract.providers import Reward


@dataclass(frozen=True)
class Counting(Reward):
    """One more for each completion, and the number of completions seen so far modulo 3."""

    def open(self, context: OpenContext) -> Counter:
        return Counter()


class Counter:
    """The number of completions seen."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, rollouts: Rollouts) -> torch.Tensor:
        first, self.seen = self.seen, self.seen + len(rollouts)
        return torch.arange(first, self.seen) % 3 + rollouts.lengths_N.float()

    def close(self) -> None:
        """Nothing is open."""

    def state_dict(self) -> Mapping[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = int(state["seen"])
