"""Schedule `acg`: several coordinates and few candidates early, one coordinate and many candidates late.

The idea is Haize Labs' accelerated coordinate gradient (2024): early, almost any change helps, so steps should be cheap and
large; late, few changes help, so a step has to try many. There the numbers follow a fixed table. Here they follow success: a
step that improves nothing doubles the candidates and replaces one token less; a step that improves halves the candidates.
The suffix never gets worse.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.candidates import draw_candidates
from rlhf_eval_gcg.attack.optimizer import Losses, Move, Suffix, TokenGradient

if TYPE_CHECKING:
    from rlhf_eval_gcg.attack.options import Attack

__all__ = ["Acg"]

FIRST_SHARE = 32
"""The first step tries this many times fewer candidates than the last ones may."""
FURTHER = 1
"""Tokens that the first candidates replace in addition to `n_replace`."""


class Acg:
    """Adapts the number of candidates and of replaced tokens to the success of its steps."""

    def __init__(self, options: Attack) -> None:
        self.options = options
        self.least = max(1, options.search_width // FIRST_SHARE)

    def step(self, suffix: Suffix) -> Generator[TokenGradient | Losses, Any, Move]:
        """Do one step."""
        options, memory = self.options, suffix.memory
        width = int(memory.get("width", torch.tensor(self.least)))
        n_replace = int(memory.get("n_replace", torch.tensor(options.n_replace + FURTHER)))
        gradient_LV, loss = yield TokenGradient(suffix.ids_L)
        ids_CL = draw_candidates(suffix, gradient_LV, width, n_replace, options.topk)
        losses_C = yield Losses(ids_CL)
        best = int(losses_C.argmin())
        improved = float(losses_C[best]) < loss
        width = max(self.least, width // 2) if improved else min(options.search_width, width * 2)
        memory["width"] = torch.tensor(width)
        memory["n_replace"] = torch.tensor(n_replace if improved else max(options.n_replace, n_replace - 1))
        return Move(ids_CL[best], float(losses_C[best])) if improved else Move(suffix.ids_L, loss)
