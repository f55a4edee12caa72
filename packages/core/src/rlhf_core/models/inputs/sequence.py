"""Packed rows cut over ranks, so that each rank computes on a share of the tokens of every row.

All ranks of a group have the same rows. Each takes a stretch of the packed tokens through the layers, in one piece or several;
attention brings the stretches together (`attend`). A rank applies heads to the states of its own stretch, and the outputs are
added up, zero where another rank has the state. So losses see whole rows.

The gradient of that sum is handed on as it is: every rank has the whole loss, and its weights get the part that went through
its own stretch. Gradients of all ranks together are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_core.models.inputs.arrange import Inputs
from rlhf_core.models.inputs.packing import PackedRows

__all__ = ["SequenceShards", "Stretch"]


@dataclass(frozen=True)
class Stretch:
    """A rank's stretch of a micro-batch."""

    arguments: dict[str, Any]
    """arguments of the body's forward pass"""
    inputs: Inputs
    """positions in the stretch of the inputs whose states it holds"""
    own_N: Tensor
    """bool, completions whose last state is in it; `inputs.last_N` is 0 for others"""


@dataclass(frozen=True)
class SequenceShards:
    """The ranks that share rows."""

    pieces: tuple[int, ...]
    """numbers of the pieces of this rank, ascending; there are `size` times as many, of the same width"""
    size: int
    group: Any
    attend: Callable[..., Tensor]
    """attention of a stretch to whole rows: (module, query, key, value, cu_seq_lens_q, ...) -> (1, tokens, heads, D)"""

    def cut(self, rows: PackedRows, inputs: Inputs) -> Stretch:
        """Return this rank's stretch. The last piece is padded with an unused row."""
        total, count = rows.ids_1S.shape[1], self.size * len(self.pieces)
        width = -(-total // count)
        fill = width * count - total
        ids_1S, positions_1S = (torch.nn.functional.pad(each, (0, fill)) for each in (rows.ids_1S, rows.positions_1S))
        bounds = torch.cat([rows.bounds, rows.bounds[-1:] + fill]) if fill else rows.bounds
        whole = PackedRows(ids_1S, positions_1S, bounds, max(rows.longest, fill))
        own = torch.cat([torch.arange(width, device=ids_1S.device) + width * piece for piece in self.pieces])
        place_S = torch.full_like(ids_1S[0], -1)  # in this rank's stretch, of each token
        place_S[own] = torch.arange(len(own), device=own.device)
        arguments = whole.arguments(flash=False) | {
            "input_ids": ids_1S[:, own],
            "position_ids": positions_1S[:, own],
            "attend": self.attend,
        }
        states_M, last_N = place_S[inputs.states_M], place_S[inputs.last_N]
        mine_M = (states_M >= 0).nonzero().flatten()
        found = replace(
            inputs,
            states_M=states_M[mine_M],
            slots_M=inputs.slots_M[mine_M],
            targets_M=inputs.targets_M[mine_M],
            last_N=last_N.clamp(min=0),
            kept=inputs.kept.part(mine_M) if inputs.kept is not None else None,
        )
        return Stretch(arguments, found, last_N >= 0)

    def add_up(self, values: Tensor, states: Tensor) -> Tensor:
        """Return the sum of `values` over the ranks; its gradient reaches `states` on every rank, so that all go backward."""
        total: Tensor = _Sum.apply(values, states, self.group)  # type: ignore[no-untyped-call]
        return total


class _Sum(torch.autograd.Function):
    """A sum over ranks whose gradient each rank takes for its own share, and a zero gradient for states."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, states: Tensor, group: Any) -> Tensor:
        ctx.states = states.shape, states.dtype
        total = values.detach().clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        shape, dtype = ctx.states
        return gradients[0], gradients[0].new_zeros(shape, dtype=dtype), None
