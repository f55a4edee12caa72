"""Chances of positions and of two sources of tokens, from the losses of earlier candidates.

Two arrays of the suffix's memory hold it. `changes_3L` has, for each position, the number of replacements, the sum of what they
changed in the loss, and the sum of the squares. `sources_22` has the improvements and the number of the candidates whose tokens
come from the gradient, and of those whose tokens come from the answers. Both fade when the suffix moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.optimizer import Move, Suffix

__all__ = ["follow_move", "note_losses", "place_chances", "token_chances"]

KEPT = 0.9
"""Weight that earlier losses keep when the suffix moves."""
LEAST = 0.01
"""Least chance of a position, so that none is given up."""


def place_chances(suffix: Suffix) -> Tensor:
    """Return the chance that a replacement at each position improves (L,), float64; all are equal before any loss is known.

    Changes are taken as normal. The mean of a position counts the mean over all once more, as one further replacement would.
    The variance is shared by all positions.
    """
    count_L, total_L, square_L = _changes(suffix)
    if not count_L.any():
        return torch.ones_like(count_L)
    mean_L = (total_L + total_L.sum() / count_L.sum()) / (count_L + 1)
    spread = (square_L - 2 * mean_L * total_L + mean_L**2 * count_L).sum() / count_L.sum()
    error_L = (spread * (1 + 1 / (count_L + 1))).sqrt().clamp(min=1e-9)  # of a prediction from so few
    chance_L: Tensor = torch.special.ndtr(-mean_L / error_L)
    return chance_L.clamp(min=LEAST)


def token_chances(suffix: Suffix, answers: int, tops: int) -> Tensor:
    """Return the weights of a position's tokens (answers + tops,), float64; they sum to 1.

    The sources share the draws by their rates of improvement, each with one improvement in two candidates added. Tokens of the
    answers are equally likely. Tokens of the gradient are drawn by one over their rank.

    Args:
        suffix: whose memory has the rates.
        answers: number of tokens from the answers.
        tops: number of tokens from the gradient, best first.
    """
    ranks = 1 / torch.arange(1, tops + 1, dtype=torch.float64)
    ranks = ranks / ranks.sum()
    if not answers:
        return ranks
    improved_2, tried_2 = _sources(suffix).unbind(1)
    rate_2 = (improved_2 + 1) / (tried_2 + 2)
    share_2 = rate_2 / rate_2.sum()
    return torch.cat([(share_2[1] / answers).expand(answers), share_2[0] * ranks])


def note_losses(suffix: Suffix, ids_CL: Tensor, losses_C: Tensor, loss: float) -> None:
    """Add the losses of candidates to the memory.

    Where a candidate replaces several tokens, each position gets an equal part of the change.

    Args:
        suffix: the current suffix.
        ids_CL: candidates.
        losses_C: their losses.
        loss: of the current suffix.
    """
    changed_CL, part_CL = _parts(suffix, ids_CL, losses_C, loss)
    more_3L = torch.stack([changed_CL.double().sum(0), part_CL.sum(0), (part_CL**2).sum(0)])
    answers_M, improved_C = suffix.answer_M.cpu(), (losses_C < loss).cpu()
    quoted_C = (torch.isin(ids_CL.cpu(), answers_M) | ~changed_CL).all(1)
    more_22 = torch.stack([torch.stack([(improved_C & own).sum(), own.sum()]) for own in (~quoted_C, quoted_C)])
    suffix.memory["changes_3L"] = _changes(suffix) + more_3L
    suffix.memory["sources_22"] = _sources(suffix) + more_22


def follow_move(suffix: Suffix, ids_CL: Tensor, losses_C: Tensor, loss: float, move: Move) -> None:
    """Bring the memory to the next suffix, whose loss is lower.

    Where a position has a better token, every other token there looks worse by what the better one has gained. The gain is
    shared by the replaced positions as the candidates that were merged had it.

    Args:
        suffix: the suffix before the move.
        ids_CL: the candidates of the step, without merges.
        losses_C: their losses.
        loss: of the suffix before the move.
        move: the next suffix and its loss.
    """
    current_L, new_L = suffix.ids_L.cpu(), move.ids_L.cpu()
    _, part_CL = _parts(suffix, ids_CL, losses_C, loss)
    rows_CL = ids_CL.cpu()
    inside_C = ((rows_CL == new_L) | (rows_CL == current_L)).all(1)
    gain_L = (-part_CL * inside_C[:, None]).sum(0).clamp(min=0) * (new_L != current_L)
    gain_L = gain_L * (loss - move.loss) / gain_L.sum().clamp(min=1e-12)
    count_L, total_L, square_L = _changes(suffix)
    later_3L = torch.stack([count_L, total_L + count_L * gain_L, square_L + 2 * gain_L * total_L + count_L * gain_L**2])
    suffix.memory["changes_3L"], suffix.memory["sources_22"] = KEPT * later_3L, KEPT * _sources(suffix)


def _parts(suffix: Suffix, ids_CL: Tensor, losses_C: Tensor, loss: float) -> tuple[Tensor, Tensor]:
    """Return which positions the candidates replace (C, L), and the part of the change in loss of each (C, L), float64."""
    changed_CL = ids_CL.cpu() != suffix.ids_L.cpu()
    part_C = (losses_C.cpu().double() - loss) / changed_CL.sum(1).clamp(min=1)
    return changed_CL, part_C[:, None] * changed_CL


def _changes(suffix: Suffix) -> Tensor:
    """Return `changes_3L`, float64."""
    found = suffix.memory.get("changes_3L")
    return torch.zeros(3, len(suffix.ids_L), dtype=torch.float64) if found is None else found.cpu()


def _sources(suffix: Suffix) -> Tensor:
    """Return `sources_22`, float64: a row (improved, tried) for the gradient, and one for the answers."""
    found = suffix.memory.get("sources_22")
    return torch.zeros(2, 2, dtype=torch.float64) if found is None else found.cpu()
