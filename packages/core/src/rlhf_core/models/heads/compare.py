"""A function of two roles' whole next-token distributions at every completion token, a few tokens at a time.

The logits of both, (rows, V) each, exist for one chunk of rows only and are computed again in the backward pass; the other
role's states come from a forward pass of its body on the same tokens, without a gradient. So nothing of size [N, T, V] exists,
and the function may be anything: a divergence, its mixture with another, the distance of two entropies.

Both roles are in one process. Where their vocabularies are padded to different sizes, the shorter one is used for both.

Shape letters: M completion tokens of a batch, m rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_core.models.heads.logprobs import CPU_LOGITS

if TYPE_CHECKING:
    from rlhf_core.models.heads.modules import ChunkedHead
    from rlhf_core.models.inputs.arrange import Inputs

__all__ = ["ComparedModule", "Comparison"]


class ComparedModule(Protocol):
    """The part of a role's module that a comparison reads."""

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face causal language model, its output embeddings a `ChunkedHead`."""

    def states_of(self, inputs: Inputs) -> Tensor:
        """Return the states that predict completion tokens (M, H)."""


@dataclass(frozen=True)
class Comparison:
    """Parts of one output of a role.

    Args:
        other: the module of the role it is compared with.
        function: (logits, the other's logits), float32 (m, V) each, to one number a row (m,); differentiable in the first.
    """

    other: ComparedModule
    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, head: ChunkedHead, states_MH: Tensor, inputs: Inputs) -> Tensor:
        """The function at every completion token (M,)."""
        other_head = self.other.causal_lm.get_output_embeddings()
        with torch.no_grad(), torch.autocast(states_MH.device.type, enabled=False):
            theirs_MH = self.other.states_of(inputs)

        def at(own_mH: Tensor, theirs_mH: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(own_mH.device.type, enabled=False):
                theirs_mV = other_head(theirs_mH, scaled=True)
            own_mV = head(own_mH, scaled=True)
            V = min(own_mV.shape[1], theirs_mV.shape[1])
            return self.function(own_mV[:, :V], theirs_mV[:, :V])

        rows = rows_at_a_time(head, states_MH)
        pairs = zip(states_MH.split(rows), theirs_MH.split(rows), strict=True)
        if not torch.is_grad_enabled() or not head.chunk:
            return torch.cat([at(own_mH, theirs_mH) for own_mH, theirs_mH in pairs])
        parts = [checkpoint(at, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
        return torch.cat(parts)


def rows_at_a_time(head: ChunkedHead, states_MH: Tensor) -> int:
    """Return the number of rows of logits to hold at a time; all where the head holds all."""
    held = head.chunk or len(states_MH)
    if head.chunk and states_MH.device.type == "cpu":
        held = min(held, CPU_LOGITS // len(head.weight))
    return max(1, held)
