"""Schedule `acg`: few candidates while many improve, many when few do, and a merge of those that improve.

Three ideas make a step cheaper than one of GCG, or let it go further.

* Accelerated coordinate gradient (Haize Labs 2024). Early, almost any change helps, so steps should be cheap; late, few changes
  help, so a step has to try many. There the numbers follow a fixed table. Here they follow success: a step that improves
  nothing doubles the candidates, and a step that improves halves them.
* Multi-coordinate updating (I-GCG, Jia et al. 2024, arXiv:2405.21018). Candidates are merged into one suffix, which is scored
  as well. There the best candidates are merged. Here a candidate must also improve the loss, replace other positions than
  better ones, and leave a suffix that passes the filter.
* No work twice. Faster-GCG (Li et al. 2024, arXiv:2410.15362) avoids suffixes that were tried before. Here a suffix that stays
  also keeps its gradient, which is not computed again.

The suffix never gets worse.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.candidates import replace_tokens, top_tokens
from rlhf_eval_gcg.attack.optimizer import Losses, Move, Suffix, TokenGradient

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.options import Attack

__all__ = ["Acg", "merge_improvements"]

FIRST_SHARE = 32
"""The first step tries this many times fewer candidates than the last ones may."""


class Acg:
    """Adapts the number of candidates to the success of its steps, and merges the candidates that improve."""

    def __init__(self, options: Attack) -> None:
        self.options = options
        self.least = max(1, options.search_width // FIRST_SHARE)

    def step(self, suffix: Suffix) -> Generator[TokenGradient | Losses, Any, Move]:
        """Do one step."""
        options, memory, loss = self.options, suffix.memory, suffix.loss
        width = int(memory.get("width", torch.tensor(self.least)))
        if "tops_LK" not in memory:
            gradient_LV, loss = yield TokenGradient(suffix.ids_L)
            memory["tops_LK"] = top_tokens(gradient_LV, suffix.allowed_V, options.topk).cpu()
            memory["tried_CL"] = suffix.ids_L.cpu()[None]
        ids_CL = self._draw(suffix, width)
        losses_C = yield Losses(ids_CL)
        merged_ML = merge_improvements(suffix, ids_CL, losses_C, loss)
        if len(merged_ML):
            ids_CL, losses_C = torch.cat([ids_CL, merged_ML]), torch.cat([losses_C, (yield Losses(merged_ML))])
        best = int(losses_C.argmin())
        improved = float(losses_C[best]) < loss
        memory["width"] = torch.tensor(
            max(self.least, width // 2) if improved else min(options.search_width, width * 2)
        )
        if improved or options.objective == "reward":  # whose answers, and so the gradient, are new in each step
            del memory["tops_LK"], memory["tried_CL"]
        else:
            memory["tried_CL"] = torch.cat([memory["tried_CL"].cpu(), ids_CL.cpu()])
        return Move(ids_CL[best], float(losses_C[best])) if improved else Move(suffix.ids_L, loss)

    def _draw(self, suffix: Suffix, width: int) -> Tensor:
        """Return candidates that were not tried yet (C, L).

        They replace one token more if there are no others. If there are none of these either, tried ones come again.
        """
        n_replace, memory = self.options.n_replace, suffix.memory
        tops_LK, tried_CL = memory["tops_LK"].cpu(), memory["tried_CL"].cpu()
        for count in (n_replace, n_replace + 1):
            ids_CL = replace_tokens(suffix, tops_LK, width, count, tried_CL)
            if len(ids_CL):
                return ids_CL
        return replace_tokens(suffix, tops_LK, width, n_replace, tried_CL[:1])


def merge_improvements(suffix: Suffix, ids_CL: Tensor, losses_C: Tensor, loss: float) -> Tensor:
    """Return the best two improving candidates in one suffix, the best three, and so on (M, L).

    A candidate is left out if it replaces a position that a better one has replaced, or if the filter drops the suffix with it.

    Args:
        suffix: the current suffix.
        ids_CL: candidates.
        losses_C: their losses.
        loss: of the current suffix.
    """
    current_L, rows_CL = suffix.ids_L.cpu(), ids_CL.cpu()
    merged_L = current_L
    found: list[Tensor] = []
    for row in losses_C.argsort(stable=True)[: int((losses_C < loss).sum())].tolist():
        changed_L = rows_CL[row] != current_L
        if bool((changed_L & (merged_L != current_L)).any()):
            continue
        more_L = torch.where(changed_L, rows_CL[row], merged_L)
        if bool(suffix.survivors(more_L[None])[0]):
            merged_L = more_L
            found.append(merged_L)
    return torch.stack(found).to(ids_CL.device)[1:] if found else ids_CL[:0]
