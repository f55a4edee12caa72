"""One prompt of a suffix on one model: what the suffix's loss is a mean over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.caching import Beginning
from rlhf_eval_gcg.attack.victim import Group, Victim

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_eval_gcg.attack.prompt import AttackPrompt

__all__ = ["Answers", "Lane"]


@dataclass(frozen=True)
class Answers:
    """Answers that a suffix must make likely after one prompt, and the rule that combines their losses."""

    ids: tuple[Tensor, ...]
    """tokens of each answer"""
    kind: str
    """the loss of an answer; see `losses.answer_losses`"""
    weights: tuple[float, ...] | None = None
    """the loss is the weighted sum of the answers'; None: minus the logarithm of the sum of their probabilities"""

    def combine(self, losses_KC: Tensor) -> Tensor:
        """Return the loss of each candidate (C,) from those of K answers."""
        if self.weights is None:
            found: Tensor = -(-losses_KC).logsumexp(0)
            return found
        weights_K = torch.tensor(self.weights, dtype=losses_KC.dtype, device=losses_KC.device)
        return weights_K @ losses_KC


@dataclass
class Lane:
    """One prompt on one model, with the keys and values that its candidates share."""

    victim: Victim
    prompt: AttackPrompt
    answers: Answers
    before_P: Tensor
    """tokens before the suffix"""
    after_A: Tensor
    """tokens after it"""
    opening: Beginning = field(default_factory=Beginning)
    """key-value cache of the tokens before the suffix; empty without a prefix cache"""
    base_L: Tensor | None = None
    """the suffix whose keys and values `base` holds"""
    base: Beginning = field(default_factory=Beginning)
    """key-value cache of the tokens before the suffix and of `base_L`"""
    cached: bool = False
    """share beginnings"""

    @property
    def length(self) -> int:
        """Tokens of the longest row, without the answer's last one."""
        longest = max((len(ids) for ids in self.answers.ids), default=1)
        return len(self.before_P) + len(self.prompt.suffix_ids) + len(self.after_A) + longest - 1

    def open(self) -> float:
        """Compute the keys and values of the tokens before the suffix, once; return the operations of that."""
        if not self.cached or not len(self.before_P):
            return 0.0
        if not self.opening.layers:
            with torch.no_grad():
                _, fresh = self.victim.logits([Group(Beginning(), self.before_P[None], 1)], record=True)
            self.opening = Beginning().extend(fresh)
        return self.victim.costs.forward(1, len(self.before_P), 0, 1)

    def starts(self, ids_CL: Tensor) -> Tensor:
        """Return for each candidate (C,) how many of its first tokens are those of the base, so that they are cached."""
        if self.base_L is None or not self.cached:
            return torch.zeros(len(ids_CL), dtype=torch.long)
        length = ids_CL.shape[1]
        differs_CL = ids_CL != self.base_L
        starts_C = torch.where(differs_CL.any(1), differs_CL.int().argmax(1), length)
        return starts_C.clamp(max=length - 1 + min(1, len(self.after_A))).cpu()

    def group(self, ids_CL: Tensor, start: int, answer_T: Tensor) -> Group:
        """Return the rows of candidates that share `start` tokens with the base, for one answer."""
        tail = torch.cat([self.after_A, answer_T[:-1]])
        rows = torch.cat([ids_CL[:, start:], tail.expand(len(ids_CL), -1)], 1)
        if not self.cached:
            rows = torch.cat([self.before_P.expand(len(ids_CL), -1), rows], 1)
            return Group(Beginning(), rows, len(answer_T))
        source = self.base if start else self.opening
        return Group(source.first(len(self.before_P) + start), rows, len(answer_T))
