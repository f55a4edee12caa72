"""Two completions of each prompt by chance."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.selection.candidates import Candidates
from rlhf_algos.selection.selector import PairSelector
from rlhf_core.lazy import torch

__all__ = ["RandomPairs"]


@dataclass(frozen=True)
class RandomPairs(PairSelector):
    """Selects two different completions of each prompt, uniformly and with a separate seed for every prompt and step."""

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        first = int(torch.randint(len(candidates), (), generator=candidates.generator))
        return first, candidates.draw_other(first)
