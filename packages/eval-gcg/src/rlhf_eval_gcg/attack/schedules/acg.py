"""Schedule `acg`: few candidates while many improve, many when few do, drawn by experience, and merged where they improve.

Five ideas make a step cheaper than one of GCG, or let it go further.

* Accelerated coordinate gradient (Haize Labs 2024). Early, almost any change helps, so steps should be cheap; late, few changes
  help, so a step has to try many. There the numbers follow a fixed table. Here they follow success: a step that improves
  nothing doubles the candidates, and a step that improves halves them.
* Multi-coordinate updating (I-GCG, Jia et al. 2024, arXiv:2405.21018). Candidates are merged into one suffix, which is scored
  as well. There the best candidates are merged. Here a candidate must also improve the loss, replace other positions than
  better ones, and leave a suffix that passes the filter.
* No work twice. Faster-GCG (Li et al. 2024, arXiv:2410.15362) avoids suffixes that were tried before. Here a suffix that stays
  also keeps its gradient, which is not computed again.
* Positions by success. The gradient is a poor guide to the position: where it is steep, the token often matters already, and
  each replacement harms. The losses of candidates tell more. A position is drawn by the chance that a replacement there
  improves, from the mean and the variance of what was measured (see `experience`).
* Tokens by rank and by quoting. Near the top of the gradient's list candidates improve more often, so ranks are drawn by one
  over the rank, where GCG draws uniformly. Models repeat what stands in their context (induction heads, Olsson et al. 2022,
  arXiv:2209.11895), so tokens of the target are drawn as well, as often as their rate of success deserves. Option `quote`
  turns that off.

The suffix never gets worse.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.candidates import Chances, replace_tokens, top_tokens
from rlhf_eval_gcg.attack.optimizer import Losses, Move, Suffix, TokenGradient
from rlhf_eval_gcg.attack.schedules.experience import follow_move, note_losses, place_chances, token_chances

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.options import Attack

__all__ = ["Acg", "merge_improvements"]

FIRST_SHARE = 32
"""The first step tries this many times fewer candidates than the last ones may."""


class Acg:
    """Adapts the number of candidates, their positions and their tokens to success, and merges those that improve."""

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
        drawn_CL = ids_CL = self._draw(suffix, width)
        drawn_losses_C = losses_C = yield Losses(ids_CL)
        note_losses(suffix, drawn_CL, drawn_losses_C, loss)
        merged_ML = merge_improvements(suffix, ids_CL, losses_C, loss)
        if len(merged_ML):
            ids_CL, losses_C = torch.cat([ids_CL, merged_ML]), torch.cat([losses_C, (yield Losses(merged_ML))])
        best = int(losses_C.argmin())
        improved = float(losses_C[best]) < loss
        memory["width"] = torch.tensor(
            max(self.least, width // 2) if improved else min(options.search_width, width * 2)
        )
        move = Move(ids_CL[best], float(losses_C[best])) if improved else Move(suffix.ids_L, loss)
        if improved:
            follow_move(suffix, drawn_CL, drawn_losses_C, loss, move)
        if improved or options.objective == "reward":  # whose answers, and so the gradient, are new in each step
            del memory["tops_LK"], memory["tried_CL"]
        else:
            memory["tried_CL"] = torch.cat([memory["tried_CL"].cpu(), ids_CL.cpu()])
        return move

    def _draw(self, suffix: Suffix, width: int) -> Tensor:
        """Return candidates that were not tried yet (C, L).

        They replace one token more if there are no others. If there are none of these either, tried ones come again.
        """
        n_replace, memory = self.options.n_replace, suffix.memory
        tops_LK, tried_CL = memory["tops_LK"].cpu(), memory["tried_CL"].cpu()
        quoted_M = suffix.answer_M.cpu() if self.options.quote else suffix.answer_M.cpu()[:0]
        chances = Chances(place_chances(suffix), token_chances(suffix, len(quoted_M), tops_LK.shape[1]))
        tops_LK = torch.cat([quoted_M.expand(len(tops_LK), -1), tops_LK], 1)
        for count in (n_replace, n_replace + 1):
            ids_CL = replace_tokens(suffix, tops_LK, width, count, tried_CL, chances)
            if len(ids_CL):
                return ids_CL
        return replace_tokens(suffix, tops_LK, width, n_replace, tried_CL[:1], chances)


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
