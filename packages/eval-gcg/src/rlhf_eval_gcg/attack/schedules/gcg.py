"""Schedule `gcg`: the original (Zou et al. 2023, arXiv:2307.15043, algorithm 1), with nanoGCG's buffer."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from rlhf_eval_gcg.attack.candidates import draw_candidates
from rlhf_eval_gcg.attack.optimizer import Losses, Move, Suffix, TokenGradient
from rlhf_eval_gcg.attack.schedules.pool import fill_pool, settle

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.options import Attack

__all__ = ["Gcg"]


class Gcg:
    """Moves to the best of `search_width` random replacements, each step, even to a worse one where there is no buffer."""

    def __init__(self, options: Attack) -> None:
        self.options = options

    def step(self, suffix: Suffix) -> Generator[TokenGradient | Losses, Any, Move]:
        """Do one step."""
        yield from fill_pool(suffix)
        gradient_LV, _ = yield TokenGradient(suffix.ids_L)
        ids_CL = self.candidates(suffix, gradient_LV)
        losses_C = yield Losses(ids_CL)
        return settle(suffix, ids_CL, losses_C)

    def candidates(self, suffix: Suffix, gradient_LV: Tensor) -> Tensor:
        """Return the candidates of the step (C, L)."""
        options = self.options
        return draw_candidates(suffix, gradient_LV, options.search_width, options.n_replace, options.topk)
