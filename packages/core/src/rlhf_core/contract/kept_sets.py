"""Kept sets: which tokens truncated sampling (top-p, top-k, min-p) could have drawn, token by token.

The policy that samples is the model's distribution over the kept set. Importance ratios are those of that policy only if the
trainer takes its log-probabilities over the same set, of old and new weights alike (DeepSeek-V3.2, section 3.1, "keep sampling
mask"). So a batch carries the sets (`Batch.kept_sets`).

A set of K of the V tokens of the vocabulary takes 4 K bytes as a list, and V / 8 bytes as bits. The smaller is held, so that
the flattest distribution under top-p costs V / 8 bytes per token, a thirty-second of its logits, and a typical one
under 100.

Shape letters: T tokens of a completion, K entries of lists, W tokens whose set is held as bits, B bytes of V bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.options import Sampling

__all__ = ["BITS", "WHOLE", "KeptSets", "Truncation", "replays", "truncates"]

WHOLE = 0
"""The count of a token that was not cut."""

BITS = -1
"""The count of a token whose set is held as bits."""


def truncates(sampling: Sampling) -> bool:
    """Return True if `sampling` draws from a part of the vocabulary. Greedy decoding reports whole distributions."""
    cut = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
    return cut and sampling.temperature > 0


def replays(sampling: Sampling) -> bool:
    """Return True if kept sets are to be recorded, and log-probabilities taken over them."""
    return sampling.replay == "on" and truncates(sampling)


@dataclass(frozen=True)
class Truncation:
    """Rules by which a trainer cuts its own distribution as the engine did, if the engine does not report the kept tokens."""

    top_p: float = 1.0
    """see `Sampling`"""
    top_k: int = 0
    """see `Sampling`"""
    min_p: float = 0.0
    """see `Sampling`"""
    min_p_first: bool = False
    """the order of the engine (`Rollout.min_p_first`)"""
    tokens: int = 0
    """ids from here on are never drawn, since the tokenizer has no token for them; 0 if all of the head's are"""
    holes: tuple[int, ...] = ()
    """ids below `tokens` that are never drawn, for the same reason"""


@dataclass(frozen=True, eq=False)
class KeptSets:
    """The kept sets of one completion."""

    counts_T: Tensor
    """int32: the number of kept tokens in `ids_K`, WHOLE or BITS"""
    ids_K: Tensor
    """int32: kept token ids, those of the first token first"""
    bits_WB: Tensor
    """uint8: bit 7 - v % 8 of byte v // 8 is 1 if token v was kept"""

    def __len__(self) -> int:
        return len(self.counts_T)

    @classmethod
    def whole(cls, length: int) -> KeptSets:
        """Return the sets of `length` tokens that were not cut, such as those of an environment."""
        return cls.from_lists([[]] * length)

    @classmethod
    def from_lists(cls, ids: Sequence[Sequence[int]]) -> KeptSets:
        """Return the sets with these token ids, one list per token; an empty list is a token that was not cut."""
        counts_T = torch.tensor([len(each) for each in ids], dtype=torch.int32)
        flat_K = torch.tensor([number for each in ids for number in each], dtype=torch.int32)
        return cls(counts_T, flat_K, torch.zeros(0, 0, dtype=torch.uint8))

    @classmethod
    def join(cls, parts: Sequence[KeptSets]) -> KeptSets:
        """Return the sets of the tokens of all parts, in order."""
        wide = [part.bits_WB for part in parts if len(part.bits_WB)]
        return cls(
            torch.cat([part.counts_T for part in parts]),
            torch.cat([part.ids_K for part in parts]),
            torch.cat(wide) if wide else torch.zeros(0, 0, dtype=torch.uint8),
        )

    def cut(self, length: int) -> KeptSets:
        """Return the sets of the first `length` tokens."""
        counts_T = self.counts_T[:length]
        return KeptSets(
            counts_T, self.ids_K[: int(counts_T.clamp(min=0).sum())], self.bits_WB[: int((counts_T == BITS).sum())]
        )
