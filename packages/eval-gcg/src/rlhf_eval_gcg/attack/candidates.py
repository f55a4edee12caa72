"""Candidates: suffixes with a few tokens replaced by ones that the gradient favors (Zou et al. 2023, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.errors import UsageError, option
from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.optimizer import Suffix

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Chances", "draw_candidates", "replace_tokens", "top_tokens"]

ATTEMPTS = 8
"""Draws of a step before it is clear that no candidate survives the filter."""


@dataclass(frozen=True)
class Chances:
    """Weights of the draws; they need not sum to 1."""

    places_L: Tensor
    """weight of each position"""
    tokens_K: Tensor
    """weight of each token of a position, in their order"""


def top_tokens(gradient_LV: Tensor, allowed_V: Tensor, topk: int) -> Tensor:
    """Return the `topk` allowed tokens with the most negative gradient at each position (L, K), best first."""
    forbidden = gradient_LV.masked_fill(~allowed_V, torch.inf)
    chosen: Tensor = (-forbidden).topk(min(topk, int(allowed_V.sum())), dim=1).indices
    return chosen


def draw_candidates(suffix: Suffix, gradient_LV: Tensor, width: int, n_replace: int, topk: int) -> Tensor:
    """Return up to `width` candidates (C, L), all different from each other and from the current suffix.

    Each replaces `n_replace` positions, drawn without repetition, by tokens drawn from the best `topk` there. Where `width`
    allows all replacements of single tokens, all are taken.

    Raises:
        UsageError: none survives the filter.
    """
    tops_LK = top_tokens(gradient_LV, suffix.allowed_V, topk).cpu()
    return replace_tokens(suffix, tops_LK, width, n_replace, suffix.ids_L.cpu()[None])


def replace_tokens(
    suffix: Suffix, tops_LK: Tensor, width: int, n_replace: int, tried_CL: Tensor, chances: Chances | None = None
) -> Tensor:
    """Return the candidates of `draw_candidates` from the best tokens of each position, without those tried before.

    Args:
        suffix: the current suffix.
        tops_LK: the tokens that are drawn from.
        width: maximum number of candidates.
        n_replace: positions that a candidate replaces.
        tried_CL: the current suffix, and candidates that are not to come again. If there are any, the result may be empty.
        chances: of positions and tokens; None draws all alike.

    Raises:
        UsageError: none survives the filter.
    """
    current_L = suffix.ids_L.cpu()
    whole = n_replace == 1 and width >= tops_LK.numel()
    for _ in range(1 if whole else ATTEMPTS):
        drawn_CL = _every_one(current_L, tops_LK) if whole else _draw(suffix, tops_LK, width, n_replace, chances)
        ids_CL = _unlike(drawn_CL, tried_CL)
        ids_CL = ids_CL[suffix.survivors(ids_CL)]
        if len(ids_CL):
            break
    if len(ids_CL) or len(tried_CL) > 1:
        return ids_CL.to(suffix.ids_L.device)
    tried = tops_LK.numel() if whole else ATTEMPTS * width
    raise UsageError(
        f"{suffix.place}: no candidate passes the filter: none of {tried} keeps its tokens when its text is "
        f"tokenized again; set {option('filter_ids', 'False')}, another {option('suffix')}, or "
        f"{option('ascii', 'False')}"
    )


def _every_one(current_L: Tensor, tops_LK: Tensor) -> Tensor:
    """Return every replacement of one token by one of the best of its position (L K, L)."""
    places_C = torch.arange(len(current_L)).repeat_interleave(tops_LK.shape[1])
    return current_L.repeat(tops_LK.numel(), 1).scatter(1, places_C[:, None], tops_LK.reshape(-1, 1))


def _draw(suffix: Suffix, tops_LK: Tensor, width: int, n_replace: int, chances: Chances | None) -> Tensor:
    """Return `width` random replacements of `n_replace` tokens (C, L)."""
    current_L, draw = suffix.ids_L.cpu(), suffix.generator
    count = min(n_replace, len(current_L))
    if chances is None:
        places_CN = torch.rand(width, len(current_L), generator=draw).argsort(1)[:, :count]
        picks_CN = torch.randint(tops_LK.shape[1], places_CN.shape, generator=draw)
    else:
        places_CN = chances.places_L.expand(width, -1).multinomial(count, generator=draw)
        picks_CN = chances.tokens_K.multinomial(width * count, replacement=True, generator=draw).view(width, count)
    return current_L.repeat(width, 1).scatter(1, places_CN, tops_LK[places_CN, picks_CN])


def _unlike(ids_CL: Tensor, tried_CL: Tensor) -> Tensor:
    """Return the rows that differ from those tried and from earlier rows, in their order."""
    seen = set(map(tuple, tried_CL.tolist()))
    kept = []
    for row, ids in enumerate(ids_CL.tolist()):
        if tuple(ids) not in seen:
            seen.add(tuple(ids))
            kept.append(row)
    return ids_CL[kept]
