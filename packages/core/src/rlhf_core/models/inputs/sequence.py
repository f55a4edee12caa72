"""Packed rows cut over ranks, so that each rank computes on a share of the tokens of every row.

All ranks of a group have the same rows. Each takes a stretch of the packed tokens through the layers; attention brings the
stretches together (`attend`). A rank applies heads to the states of its own stretch, and the outputs are added up, zero where
another rank has the state. So losses see whole rows.

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

    rank: int
    size: int
    group: Any
    attend: Callable[..., Tensor]
    """attention of a stretch to whole rows: (module, query, key, value, cu_seq_lens_q, ...) -> (1, tokens, heads, D)"""

    def cut(self, rows: PackedRows, inputs: Inputs) -> Stretch:
        """Return this rank's stretch. The last one is padded with an unused row."""
        total = rows.ids_1S.shape[1]
        width = -(-total // self.size)
        fill, start = width * self.size - total, width * self.rank
        ids_1S, positions_1S = (torch.nn.functional.pad(each, (0, fill)) for each in (rows.ids_1S, rows.positions_1S))
        bounds = torch.cat([rows.bounds, rows.bounds[-1:] + fill]) if fill else rows.bounds
        whole = PackedRows(ids_1S, positions_1S, bounds, max(rows.longest, fill))
        own = slice(start, start + width)
        arguments = whole.arguments(flash=False) | {
            "input_ids": ids_1S[:, own],
            "position_ids": positions_1S[:, own],
            "attend": self.attend,
        }
        mine_M = ((inputs.states_M >= start) & (inputs.states_M < start + width)).nonzero().flatten()
        own_N = (inputs.last_N >= start) & (inputs.last_N < start + width)
        kept = inputs.kept
        if kept is not None:  # states follow one another as tokens do, so those of a stretch do, too
            first = int(mine_M[0]) if len(mine_M) else 0
            kept = kept.part(slice(first, first + len(mine_M)))
        found = replace(
            inputs,
            states_M=inputs.states_M[mine_M] - start,
            slots_M=inputs.slots_M[mine_M],
            targets_M=inputs.targets_M[mine_M],
            last_N=torch.where(own_N, inputs.last_N - start, 0),
            kept=kept,
        )
        return Stretch(arguments, found, own_N)

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
