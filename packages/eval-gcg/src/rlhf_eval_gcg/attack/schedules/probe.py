"""Schedule `probe`: a draft model chooses which candidates the model scores (Zhao et al. 2024, arXiv:2403.01251).

The draft model scores all candidates, the model a random sixteenth of them. The better both agree on those (Spearman's rank
correlation), the fewer of the draft's favorites the model scores as well. The best of both sets wins.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import OptionError
from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.optimizer import Losses, Move, Suffix, TokenGradient
from rlhf_eval_gcg.attack.schedules.gcg import Gcg
from rlhf_eval_gcg.attack.schedules.pool import fill_pool, settle

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Probe", "spearman"]

PROBES, FAVORITES = 16, 8
"""The model scores a 16th of the candidates, and at most an 8th of them among the draft's favorites (section 3.2)."""


class Probe(Gcg):
    """Scores few candidates by the model, many by a draft model."""

    def step(self, suffix: Suffix) -> Generator[TokenGradient | Losses, Any, Move]:
        """Do one step."""
        if not suffix.has_draft:
            raise OptionError(
                "schedule", "probe needs a draft model; name a small one with the same tokenizer, or use acg"
            )
        yield from fill_pool(suffix)
        gradient_LV, _ = yield TokenGradient(suffix.ids_L)
        ids_CL = self.candidates(suffix, gradient_LV)
        drafts_C = yield Losses(ids_CL, by_draft=True)
        order_C = torch.randperm(len(ids_CL), generator=suffix.generator)
        probes = order_C[: max(2, len(ids_CL) // PROBES)].to(ids_CL.device)
        found = yield Losses(ids_CL[probes])
        agreement = (1 + spearman(found, drafts_C[probes])) / 2
        count = max(1, int((1 - agreement) * len(ids_CL) / FAVORITES))
        favorites = drafts_C.argsort()[:count]
        others = yield Losses(ids_CL[favorites])
        return settle(suffix, torch.cat([ids_CL[probes], ids_CL[favorites]]), torch.cat([found, others]))


def spearman(one_C: Tensor, other_C: Tensor) -> float:
    """Return Spearman's rank correlation, -1 to 1; ties get ranks by position. 0 where one value is all there is."""
    if len(one_C) < 2:
        return 0.0
    ranks = [each.argsort(stable=True).argsort(stable=True).double() for each in (one_C, other_C)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
