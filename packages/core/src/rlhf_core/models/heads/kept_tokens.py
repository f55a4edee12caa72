"""Log-probabilities over kept sets: what truncated sampling drew from, computed again by the trainer.

The sets come with the batch (`contract.kept_sets`), or by the engine's rules from the trainer's own logits, row by row: a batch
may hold completions of several engines. A mask (m, V) exists for as many tokens at a time as logits do.

Shape letters: M completion tokens of a micro-batch, m of them at a time, V vocabulary, K entries of lists, W sets as bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlhf_core.contract.kept_sets import BITS, WHOLE, KeptSets, Truncation
from rlhf_core.lazy import torch
from rlhf_core.models.heads.warp import warp

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch

__all__ = ["KeptTokens", "arrange_kept", "kept_logprobs"]


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The kept sets of M tokens."""

    whole_M: Tensor
    """bool, tokens that were not cut"""
    starts_M: Tensor
    """int64, where each token's list begins in `ids_K`"""
    ends_M: Tensor
    """int64, and where it ends"""
    ids_K: Tensor
    """int32, kept token ids"""
    wide_M: Tensor
    """int64, which of `bits_WB` a token has; -1 for none"""
    bits_WB: Tensor
    """uint8, see `KeptSets`"""
    rule_M: Tensor
    """int64, which of `rules` cuts a token's distribution; -1 where the engine gave the set"""
    rules: tuple[Truncation, ...] = ()
    """rules that occur"""

    def to(self, device: torch.device | str) -> KeptTokens:
        """Return the same on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if name != "rules"}
        return replace(self, **tensors)

    def part(self, tokens: Tensor) -> KeptTokens:
        """Return the kept sets of some of the tokens, by their int64 numbers."""
        own = {name: value[tokens] for name, value in vars(self).items() if name.endswith("_M")}
        lengths = own["ends_M"] - own["starts_M"]
        own["ends_M"] = lengths.cumsum(0)  # lists follow one another without a gap, which `mask` relies on
        entry = torch.arange(int(lengths.sum()), device=lengths.device)
        ids_K = self.ids_K[entry + (own["starts_M"] - own["ends_M"] + lengths).repeat_interleave(lengths)]
        return replace(self, **{**own, "starts_M": own["ends_M"] - lengths, "ids_K": ids_K})

    def mask(self, tokens: slice, logits_mV: Tensor) -> Tensor:
        """Return which tokens of the vocabulary are kept, bool (m, V), where rules cut the distribution of these logits."""
        mask_mV = self.whole_M[tokens, None].repeat(1, logits_mV.shape[1])
        starts_m, ends_m = self.starts_M[tokens], self.ends_M[tokens]
        if len(starts_m):
            rows = torch.arange(len(starts_m), device=starts_m.device).repeat_interleave(ends_m - starts_m)
            mask_mV[rows, self.ids_K[int(starts_m[0]) : int(ends_m[-1])].long()] = True
        wide_m = self.wide_M[tokens]
        if bool((wide_m >= 0).any()):
            column_V = torch.arange(logits_mV.shape[1], device=wide_m.device)
            bytes_wV = self.bits_WB[wide_m[wide_m >= 0]][:, column_V >> 3]
            mask_mV[wide_m >= 0] = (bytes_wV >> (7 - (column_V & 7)).to(torch.uint8)) & 1 == 1
        for number, rule in enumerate(self.rules):
            if bool((ruled_m := self.rule_M[tokens] == number).any()):
                mask_mV[ruled_m] = _cut(logits_mV[ruled_m], rule)
        return mask_mV


def arrange_kept(batch: Batch) -> KeptTokens | None:
    """Return the kept sets of the completion tokens of `batch`, row after row; None where nothing was cut."""
    if not batch.kept_sets:
        return None
    lengths = batch.lengths_N.tolist()
    rules = tuple(dict.fromkeys(each for each in batch.kept_sets if isinstance(each, Truncation)))
    rule_N = [rules.index(each) if isinstance(each, Truncation) else -1 for each in batch.kept_sets]
    joined = KeptSets.join(
        [
            each if isinstance(each, KeptSets) else KeptSets.whole(length)
            for each, length in zip(batch.kept_sets, lengths, strict=True)
        ]
    )
    assert len(joined) == sum(lengths), "kept sets belong to each token of a completion"
    counts_M = joined.counts_T.long()
    ends_M = counts_M.clamp(min=0).cumsum(0)
    is_wide_M = counts_M == BITS
    return KeptTokens(
        whole_M=counts_M == WHOLE,
        starts_M=ends_M - counts_M.clamp(min=0),
        ends_M=ends_M,
        ids_K=joined.ids_K,
        wide_M=(is_wide_M.long().cumsum(0) - 1).masked_fill(~is_wide_M, -1),
        bits_WB=joined.bits_WB,
        rule_M=torch.tensor(rule_N).repeat_interleave(batch.lengths_N.cpu()),
        rules=rules,
    )


def kept_logprobs(logits_mV: Tensor, targets_m: Tensor, kept: KeptTokens, tokens: slice) -> Tensor:
    """Return log-probabilities over the kept sets (m,), of logits after scale and temperature. Differentiable.

    A target always counts as kept: an engine with another precision may have drawn a token at the edge.
    """
    targets_m1 = targets_m[:, None]
    mask_mV = kept.mask(tokens, logits_mV.detach()).scatter(1, targets_m1, True)
    return logits_mV.gather(1, targets_m1)[:, 0] - logits_mV.masked_fill(~mask_mV, -torch.inf).logsumexp(-1)


def _cut(logits_mV: Tensor, rule: Truncation) -> Tensor:
    """Return which tokens a rule keeps (m, V), of those that can be drawn at all."""
    if rule.holes or 0 < rule.tokens < logits_mV.shape[1]:
        logits_mV = logits_mV.clone()
        logits_mV[:, rule.tokens :] = -torch.inf
        logits_mV[:, list(rule.holes)] = -torch.inf
    return warp(logits_mV, 1.0, rule.top_p, rule.top_k, rule.min_p, rule.min_p_first).kept_NV
