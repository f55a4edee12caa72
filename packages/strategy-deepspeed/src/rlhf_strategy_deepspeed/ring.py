"""Ring attention (Liu et al. 2023, arXiv:2310.01889) around core's packed rows, in torch alone, on gloo and NCCL.

A rank keeps the queries of its tokens. Keys and values go round the ring of ranks, one hop at a time, while the block of those
that are here is computed. The backward pass sends them round again and computes weights again. The gradients of keys and
values follow one hop behind, in float32, and end where the keys are.

Tokens lie in zigzag order: of 2 N pieces rank i holds pieces i and 2 N - 1 - i. So every rank has the same part of a causal
row's work, as in striped attention (Brandon et al. 2023, arXiv:2311.09431), and a piece stays a stretch of a row.

With t = T / N tokens of a rank, g key heads of D numbers, and elements of b bytes, a rank sends per layer and pass
2 (N - 1) t g D b bytes forward, and 2 (N - 1) t g D (b + 4) backward.

Left out: sliding windows, and saving hops where rows are short. In this order a row of the second half continues on the rank
before, which is the last hop away.

Shape letters: h query heads, g key heads, t tokens of a rank, D numbers per head.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_core.errors import OptionError
from rlhf_strategy_deepspeed.ring_blocks import Block, add_gradients, attend, merge, plan_blocks

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RingAttention", "check_layers", "zigzag"]


def zigzag(rank: int, size: int) -> tuple[int, int]:
    """Return the numbers of the pieces of a rank, of two for each of `size` ranks."""
    return rank, 2 * size - 1 - rank


class Hop:
    """Numbers on their way to the next rank, while others of the same shape come from the one before."""

    def __init__(self, tensor: Tensor, ring: RingAttention) -> None:
        self._sent, self._received = tensor, torch.empty_like(tensor)
        after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        peer = partial(torch.distributed.P2POp, group=ring.group)
        self._works = torch.distributed.batch_isend_irecv(
            [
                peer(torch.distributed.isend, self._sent, group_peer=after),
                peer(torch.distributed.irecv, self._received, group_peer=before),
            ]
        )

    def end(self) -> Tensor:
        """Return what came, after at most the group's timeout."""
        for work in self._works:
            work.wait()
        return self._received


class RingAttention:
    """Attention of a rank's tokens to the whole rows of `group`."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        self._bounds: Tensor | None = None
        self._steps: list[list[Block]] = []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_lens_q: Tensor,
        scaling: float | None = None,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        **_: Any,
    ) -> Tensor:
        """Return attention (1, t, h, D) of (1, h, t, D).

        Raises:
            OptionError: the layer attends within a window, or to later tokens.
        """
        if sliding_window is not None or not (
            is_causal if is_causal is not None else getattr(module, "is_causal", True)
        ):
            raise _refusal(type(module).__name__)
        if self._bounds is not cu_seq_lens_q:  # all layers of a micro-batch get the same tensor
            self._bounds, self._steps = cu_seq_lens_q, self._plan(cu_seq_lens_q.tolist(), query.shape[2])
        kind = value.device.type
        narrow = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if narrow else value.dtype
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.autocast(kind, enabled=False):
            tensors = [each[0].to(dtype) for each in (query, key, value)]
            attended: Tensor = _Attention.apply(*tensors, self, self._steps, scale)  # type: ignore[no-untyped-call]
        return attended.transpose(0, 1)[None]

    def send_on(self, tensor: Tensor) -> Hop:
        """Start a hop: `tensor` goes to the next rank, and that of the rank before comes here."""
        return Hop(tensor, self)

    def _plan(self, bounds: list[int], tokens: int) -> list[list[Block]]:
        """Return the blocks of every step, in which the keys of one rank further back are here."""
        pieces = [zigzag(rank, self.size) for rank in range(self.size)]
        here = pieces[self.rank]
        return [
            plan_blocks(bounds, tokens // 2, here, pieces[(self.rank - step) % self.size]) for step in range(self.size)
        ]


def check_layers(text: Any) -> None:
    """Refuse a model with layers that ring attention cannot compute.

    Raises:
        OptionError: layers attend within a window or a chunk, or mix tokens in another way than by attention.
    """
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    other = sorted({kind for kind in kinds if kind != "full_attention"})
    if other or (len(kinds) == 1 and getattr(text, "sliding_window", None)):
        raise _refusal(other[0] if other else "sliding_attention")


def _refusal(what: str) -> OptionError:
    return OptionError(
        "sequence_kind",
        f"ring computes causal attention to whole rows alone, but this model has {what} layers; choose ulysses",
    )


class _Attention(torch.autograd.Function):
    """Attention whose keys and values go round."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: RingAttention, steps: list[list[Block]], scale: float
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        output = query.new_zeros(*query.shape[:2], value.shape[-1], dtype=wide)
        total = query.new_full(query.shape[:2], -torch.inf, dtype=wide)
        wire = _pack(key, value)
        for step, blocks in enumerate(steps):
            hop = ring.send_on(wire) if step + 1 < len(steps) else None
            here = _unpack(wire, key, value)
            for block in blocks:
                merge(output, total, block, attend(query, *here, block, scale))
            wire = hop.end() if hop is not None else wire
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, total)
        ctx.ring, ctx.steps, ctx.scale = ring, steps, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, output, total = ctx.saved_tensors
        given = (output, gradients[0], total)
        to_query = torch.zeros_like(query, dtype=total.dtype)
        wire = _pack(key, value)
        own, following = wire, None
        for step, blocks in enumerate(ctx.steps):
            hop = ctx.ring.send_on(wire) if step + 1 < len(ctx.steps) else None
            here = _unpack(wire, key, value)
            found = torch.zeros_like(wire, dtype=total.dtype)
            for block in blocks:
                add_gradients((to_query, *_unpack(found, key, value)), (query, *here), given, block, ctx.scale)
            if step == 0:
                own = found
            else:  # those of the ranks before, for the keys that are here
                found = found if following is None else found.add_(following.end())
                following = ctx.ring.send_on(found)
            wire = hop.end() if hop is not None else wire
        own = own if following is None else own.add_(following.end())
        to_key, to_value = _unpack(own, key, value)
        return to_query.to(query.dtype), to_key.to(key.dtype), to_value.to(value.dtype), None, None, None


def _pack(key: Tensor, value: Tensor) -> Tensor:
    """Return one row of numbers that travels."""
    return torch.cat([key.flatten(), value.flatten()])


def _unpack(wire: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of what travelled, in the shapes of keys and values."""
    keys, values = wire.split([key.numel(), value.numel()])
    return keys.view(key.shape), values.view(value.shape)
