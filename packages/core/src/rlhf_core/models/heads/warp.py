"""Temperature and truncation of a next-token distribution, and drawing from it.

`warp` is a pure, differentiable function of logits: what the sampler draws from is what a trainer can compute again. The
kept set is always a superlevel set, every token at least as likely as some floor, so ties are kept together and the set
depends neither on the order of the vocabulary nor on the other rows. `draw` inverts the cumulative distribution at a given
uniform number, so that a token is a function of its logits and its number alone.

Order, as in transformers: temperature, top-k, top-p of what is left, min-p. vLLM takes min-p first (`min_p_first`), so that
top-p is a share of less. The two differ only where min-p and top-p are combined.

Shape letters: N rows, V vocabulary, K blocks of B tokens.
"""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING, NamedTuple

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WarpedDistribution", "draw", "draw_from", "warp"]

BLOCK = 256
"""Tokens whose probabilities are added before the cumulative sum: a plain one over 49k tokens costs ten times as much."""

NUCLEUS = 256
"""Most likely tokens tried first for top-p: a full sort of the vocabulary is rarely needed."""


class WarpedDistribution(NamedTuple):
    """The distribution that is sampled from."""

    logprobs_NV: Tensor
    """float32, sums to one over the kept set; -inf elsewhere"""
    log_mass_N: Tensor
    """float32, log of the probability that the kept set had before the cut; 0 where nothing is cut. Ratios of a trainer that
    does not truncate are biased by exactly this: its log-probability is `logprobs + log_mass`"""

    @property
    def kept_NV(self) -> Tensor:
        """bool, the tokens that can be drawn."""
        return self.logprobs_NV > -torch.inf


def warp(
    logits_NV: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    min_p_first: bool = False,
) -> WarpedDistribution:
    """Log-probabilities at `temperature` over the tokens that top-k, top-p and min-p all keep.

    top-k keeps the k most likely tokens. top-p (Holtzman et al. 2020) keeps the smallest set of most likely tokens with at
    least that share of the probability. min-p (Nguyen et al. 2024) keeps tokens with at least that share of the most
    likely one's probability. The most likely token is always kept, and ties with the last kept token are too. The share of
    top-p is that of what top-k left, and with `min_p_first` of what min-p left of that.
    """
    V = logits_NV.shape[-1]
    logprobs_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    floors = []  # (N, 1) each: the log-probability of the least likely token that one of the rules keeps
    with torch.no_grad():
        if 0 < top_k < V:
            floors.append(logprobs_NV.topk(top_k).values[:, -1:])
        if min_p > 0 and min_p_first:
            floors.append(logprobs_NV.amax(-1, keepdim=True) + log(min_p))
        if top_p < 1:
            below_NV = logprobs_NV < torch.stack(floors).amax(0) if floors else None
            left_NV = logprobs_NV if below_NV is None else logprobs_NV.masked_fill(below_NV, -torch.inf)
            floors.append(_nucleus_floor(left_NV, top_p))
        if min_p > 0 and not min_p_first:
            floors.append(logprobs_NV.amax(-1, keepdim=True) + log(min_p))
    if not floors:
        return WarpedDistribution(logprobs_NV, logprobs_NV.new_zeros(len(logprobs_NV)))
    below_NV = logprobs_NV < torch.stack(floors).amax(0)
    kept_NV = logprobs_NV.masked_fill(below_NV, -torch.inf)
    log_mass_N1 = kept_NV.logsumexp(-1, keepdim=True)
    return WarpedDistribution(kept_NV - log_mass_N1, log_mass_N1[:, 0])


def _nucleus_floor(logprobs_NV: Tensor, top_p: float) -> Tensor:
    """(N, 1): the log-probability of the last token of the smallest set that has `top_p` of the row's probability."""
    V = logprobs_NV.shape[-1]
    wanted_N1 = top_p * logprobs_NV.exp().sum(-1, keepdim=True, dtype=torch.float64)
    k = min(NUCLEUS, V)
    while True:
        top_NK = logprobs_NV.topk(k).values
        probs_NK = top_NK.double().exp()
        inside_NK = probs_NK.cumsum(-1) - probs_NK < wanted_N1  # what comes before the token is not yet enough
        if k == V or not inside_NK[:, -1].any():
            last_N1 = inside_NK.sum(-1, keepdim=True).clamp(min=1) - 1
            return top_NK.gather(-1, last_N1)
        k = min(8 * k, V)


def draw(logprobs_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """(N,) int64: the token at which the cumulative probability passes each uniform number.

    Numbers in [0, 1 - 2^-51] never give a token of probability zero. Rows that are not finite give some token; the caller
    sees it in the log-probability.
    """
    padded_NV = torch.nn.functional.pad(logprobs_NV.exp(), (0, -logprobs_NV.shape[1] % BLOCK))
    return draw_from(padded_NV, uniforms_N).clamp(max=logprobs_NV.shape[1] - 1)


def draw_from(probs_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """(N,) int64: what `draw` gives, from probabilities up to a factor per row; none is copied where V has a divisor to cut at.

    The inverse is taken in two steps, block and token in the block, in float64.
    """
    N, V = probs_NV.shape
    block = next((size for size in (BLOCK, BLOCK // 2, BLOCK // 4) if V % size == 0), 0)
    if not block:
        block, probs_NV = BLOCK, torch.nn.functional.pad(probs_NV, (0, -V % BLOCK))
    probs_NKB = probs_NV.view(N, -1, block)
    edges_NK = torch.nn.functional.pad(probs_NKB.sum(-1).double().cumsum(-1), (1, 0))
    target_N1 = uniforms_N.double()[:, None] * edges_NK[:, -1:]
    last = probs_NKB.shape[1] - 1
    block_N1 = (torch.searchsorted(edges_NK, target_N1, right=True) - 1).clamp(max=last)  # only NaN goes past the end
    start_N1, end_N1 = edges_NK.gather(1, block_N1), edges_NK.gather(1, block_N1 + 1)
    share_N1 = ((target_N1 - start_N1) / (end_N1 - start_N1)).clamp(max=1 - 2**-50)  # rounding may make it 1
    inside_NB = probs_NKB[torch.arange(N, device=block_N1.device), block_N1[:, 0]].double().cumsum(-1)
    token_N1 = torch.searchsorted(inside_NB, share_N1 * inside_NB[:, -1:], right=True).clamp(max=block - 1)  # NaN again
    return (block_N1 * block + token_N1)[:, 0].clamp(max=V - 1)
